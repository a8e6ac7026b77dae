"""A training step without a Trainer around it, for timing."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_modules.detection import RetinaFaceModule


def make_bare_step(module: RetinaFaceModule) -> Callable[[dict[str, Any]], None]:
    """Training a detector on labels, on the GPU where there is one.

    Args:
        module: The detector; it is moved to the device and changed by every step.

    Returns:
        A function that trains with one batch of :func:`retinaface.data.loading.collate_train`, and returns when the
        device has finished.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=module.optimizer.learning_rate)

    def step(batch: dict[str, Any]) -> None:
        on_device = move_data_to_device(batch, device)
        optimizer.zero_grad()
        outputs = module.training_outputs(module.training_images(on_device))
        module.task_loss(outputs, on_device).total.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step
