"""Writes the ONNX file when a stage is done."""

from pathlib import Path

import lightning as L
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.delivery.export import export_onnx


class ExportOnnx(L.Callback):
    """Exports the trained network at the end of a fit: float, or INT8 after quantization-aware training.

    Args:
        path: The ONNX file to write; by default ``model.onnx`` in the trainer's root folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        export_onnx(pl_module.network, Path(self.path or Path(trainer.default_root_dir) / "model.onnx"))
