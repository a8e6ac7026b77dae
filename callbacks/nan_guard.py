"""Stops a training whose loss is no longer a number, while the weights still are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from retinaface.errors import InputError
from retinaface.evaluation.visualize import contact_sheet, draw_training_batch
from retinaface.model.checkpoints import write_torch_file
from retinaface.whole_file import whole_file

Batch = dict[str, Any]


class NanGuard(L.Callback):
    """Ends the fit, in all processes, before a step is taken with a loss or a gradient that is NaN or infinite.

    No weight of that step is changed and no checkpoint written, so the fit can go on from the last one. The process
    whose photos gave that loss (all, if only the gradients are wrong) writes its batch to
    ``non_finite_batch_rank<n>.pt`` in the trainer's root folder: the tensors and ``names`` of
    :func:`retinaface.data.loading.collate_train`, ``epoch``, ``step``, ``rank`` and ``losses``, loadable with
    ``weights_only=True``; and draws it in a ``.jpg`` beside it.

    It looks once per optimizer step, at the losses and the norm of the gradients together, so a GPU waits once; with
    several processes a single number is exchanged before. With ``16-mixed`` gradients may overflow, which the scaler
    deals with; there only losses count. It puts itself behind all other callbacks, so that it sees what they do to the
    gradients.

    Raises:
        InputError: A loss or a gradient is not finite; names the photos.
    """

    def __init__(self) -> None:
        self._batch: Batch = {}
        self._seen: list[tuple[Batch, Tensor]] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # A new list: the trainer is going through the old one.
        others = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._batch = batch

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._seen.append((self._batch, loss.detach()))

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        seen, self._seen = self._seen, []  # several while gradients are accumulated
        values = [loss for _, loss in seen]
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            values.append(get_total_norm(p.grad for p in pl_module.parameters() if p.grad is not None))
        finite = torch.stack(values).isfinite()
        if not _in_any_process(~finite.all()):
            return
        wrong = [batch for (batch, _), fine in zip(seen, finite.tolist(), strict=False) if not fine]
        # Gradients are averaged over the processes, so what one loss spoils is NaN in all.
        if _in_any_process(torch.tensor(bool(wrong), device=finite.device)) and not wrong:
            raise InputError(f"training: {_when(trainer)} the loss of another process is not finite; see its message")
        what = "loss is" if wrong else "gradients are"
        raise InputError(_stop(trainer, what, wrong or [batch for batch, _ in seen]))


def _in_any_process(answer: Tensor) -> bool:
    """Whether any process answers yes, which all must ask; waits for the device, once.

    The trainer's own way would have all processes wait for each other before.
    """
    count = answer.int()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
    return bool(count)


def _stop(trainer: L.Trainer, what: str, batches: Sequence[Batch]) -> str:
    """Writes the first of the batches, and says what is wrong with them and what to do."""
    batch = move_data_to_device(batches[0], torch.device("cpu"))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    losses = {name: value for name, value in logged.items() if "/" in name and not name.startswith("val/")}
    place = {"epoch": trainer.current_epoch, "step": trainer.global_step, "rank": trainer.global_rank}
    file = Path(trainer.default_root_dir) / f"non_finite_batch_rank{trainer.global_rank}.pt"
    try:
        _write(batch, {**place, "losses": losses}, file)
        look = f"Look at {file.with_suffix('.jpg')} (and {file.name}, the batch itself)"
    except OSError as error:
        look = f"The batch could not be saved ({file}: {error.strerror or error}), so look at these photos"
    photos = ", ".join(name for each in batches for name in each["names"])
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return (
        f"training: {_when(trainer)} the {what} not finite ({parts}) with the photos {photos}; the step was not taken. "
        f"{look}; if nothing is wrong there, start again with a lower model.init_args.optimizer.learning_rate or "
        "trainer.gradient_clip_val (with compress.py: in another --out)"
    )


def _write(batch: Batch, more: dict[str, Any], file: Path) -> None:
    """Writes a batch, and a picture of it beside; raises an OSError where either cannot be written."""
    write_torch_file({**batch, **more}, file)
    drawable = {
        key: value.nan_to_num(0, 0, 0) if value.is_floating_point() else value
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }
    _, picture = cv2.imencode(".jpg", contact_sheet(draw_training_batch(drawable)))
    with whole_file(file.with_suffix(".jpg")) as part:
        part.write_bytes(picture.data)


def _when(trainer: L.Trainer) -> str:
    return f"in epoch {trainer.current_epoch}, step {trainer.global_step},"
