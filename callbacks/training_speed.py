"""Says how fast a training is, and how much memory it takes on a GPU."""

import time
from typing import Any

import lightning as L
import torch
from typing_extensions import override


class TrainingSpeed(L.Callback):
    """Logs ``train/images_per_second`` of all processes, and on a GPU ``train/gpu_memory_gib`` of the first one.

    The speed is the mean since the epoch began, the fit went on within it, or a validation within it ended; waiting for
    photos counts. The memory is the most that torch has had allocated so far.

    Lightning's ``ThroughputMonitor`` waits for the GPU in every step, and has no figure for the first hundred.
    """

    def __init__(self) -> None:
        self._images = 0
        self._start = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._images, self._start = 0, time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self._images += len(batch["images"])
        seconds = time.perf_counter() - self._start
        figures = {"train/images_per_second": trainer.world_size * self._images / seconds}
        if pl_module.device.type == "cuda":
            figures["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        # As tensors on the CPU: Lightning would copy numbers to the GPU, and wait for it.
        tensors = {name: torch.tensor(value, device="cpu") for name, value in figures.items()}
        pl_module.log_dict(tensors, batch_size=len(batch["images"]))
