"""Writes the ONNX file when a stage is done."""

from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.data.annotations import evenly_spread
from retinaface.delivery.export import export_onnx
from retinaface.delivery.onnx_forms import Form, Input, OnnxSettings

_PHOTOS = 2
_AP = "val/ap_"


class ExportOnnx(L.Callback):
    """Exports the trained network at the end of a fit: float, or INT8 after quantization-aware training.

    Recipes and reports evaluate ``model.onnx``, so its form should stay ``raw``; for another form too, add a second
    ``ExportOnnx`` with a ``path``. The file says on which data root the network was trained and, where no step came
    after the last validation, what AP that measured. It is compared with torch on noise and two validation photos.

    Args:
        path: The ONNX file to write; by default ``model.onnx`` in the trainer's root folder.
        form: ``raw`` outputs, ``decoded`` boxes, scores and landmarks of every anchor, or faces, ``end_to_end``.
        input: ``normalized``: float32 minus the mean colour; ``uint8``: the picture itself; ``bgr``, ``rgb``: the
            picture with the channels last.
        size: Height and width in pixels that the file takes; None for any.
        batch: Pictures per call that the file takes; None for any number.
        score_threshold: ``end_to_end``: faces with a lower score are dropped.
        nms_threshold: ``end_to_end``: of two boxes with a higher IoU the lower-scored one is dropped.
        least_channels: INT8 for ONNX Runtime: narrower float layers are filled up to it with zeros: 16 for CPUs with
            AVX-512, 8 for those with AVX2 alone, 1 for browsers.

    Raises:
        InputError: A setting is out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        form: Form = "raw",
        input: Input = "normalized",
        size: tuple[int, int] | None = None,
        batch: int | None = None,
        score_threshold: float = 0.5,
        nms_threshold: float = 0.4,
        least_channels: int = 16,
    ) -> None:
        self.path = path
        self.settings = OnnxSettings(form, input, size, batch, score_threshold, nms_threshold, least_channels)
        self._measured: dict[str, float] = {}

    def file(self, trainer: L.Trainer) -> Path:
        """What a fit of this trainer writes."""
        return Path(self.path or Path(trainer.default_root_dir) / "model.onnx")

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._measured = {}  # of weights that are no more

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measured = _average_precision(trainer)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # A fit that is interrupted after its last validation, and goes on, has nothing left to measure.
        checkpoint["average_precision"] = self._measured
        checkpoint["trained_on"] = _trained_on(trainer)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._measured = checkpoint.get("average_precision", {})

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        export_onnx(
            pl_module.network,
            self.file(trainer),
            self.settings,
            photos=[sample.path for sample in evenly_spread(getattr(data, "val_samples", []), _PHOTOS)],
            trained_on=_trained_on(trainer),
            average_precision=self._measured or None,
        )


def _trained_on(trainer: L.Trainer) -> str | None:
    """The name of the data's folder."""
    root = getattr(trainer.datamodule, "root", None)  # type: ignore[attr-defined]
    return None if root is None else Path(root).resolve().name


def _average_precision(trainer: L.Trainer) -> dict[str, float]:
    """What the last validation of this fit measured, subset to value; without subsets that have no face (NaN)."""
    return {
        name.removeprefix(_AP): round(float(value), 4)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(_AP) and not value.isnan()
    }
