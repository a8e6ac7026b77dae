"""Quantizes the student without training it."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from callbacks.quantization import network_to_quantize, training_samples
from lightning_modules import RetinaFaceModule
from retinaface.compression.calibration import CalibrationPictures, CalibrationSettings, Observer, calibrate
from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.compression.quantizer import BackendName
from retinaface.errors import InputError


class PostTrainingQuantization(L.Callback):
    """Finds the ranges of INT8 on a few training photos when a fit begins, which then trains nothing.

    It takes seconds, and is the baseline for quantization-aware training, which takes hours.

    Args:
        keep_float: Modules, with all below them, that stay in float, such as ``backbone.stage1`` or ``class_heads``.
        backend: The runtime that it is for: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        weight_bits: 8, or 7 for CPUs without VNNI.
        photos: Training photos to look at, at their own size.
        observer: How a range is found: ``minmax``, ``moving_average``, ``histogram`` or ``percentile``.
        percentile: Share of the values, in percent, that ``percentile`` keeps on the inner side of each end.
        correct_biases: Whether the mean that each channel loses by rounding is given back to its bias.

    Raises:
        InputError: A setting is out of range; when a fit begins, ``keep_float`` names an unknown module, the network is
            quantized already, there is no data module, or a photo cannot be read.
    """

    def __init__(
        self,
        keep_float: Sequence[str] = (),
        backend: BackendName = "onnxruntime",
        weight_bits: int = 8,
        photos: int = 64,
        observer: Observer = "histogram",
        percentile: float = 99.99,
        correct_biases: bool = True,
    ) -> None:
        self.settings = QuantizationSettings(tuple(keep_float), backend=backend, weight_bits=weight_bits)
        self.calibration = CalibrationSettings(observer, percentile, correct_biases)
        if photos < 1:
            raise InputError(f"quantization: photos is {photos}; expected 1 or more")
        self.photos = photos

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, RetinaFaceModule)
        trainer.fit_loop.max_epochs = 0
        network = prepare_for_training(network_to_quantize(pl_module, self.settings), self.settings)
        if trainer.ckpt_path is None:  # else the checkpoint brings the ranges
            samples = training_samples(trainer, "quantization: calibration needs photos; give a data module")
            calibrate(
                network.to(trainer.strategy.root_device), CalibrationPictures(samples, self.photos), self.calibration
            )
        pl_module.network = network.cpu()
        pl_module.structure.quantization = self.settings

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:  # without an epoch they have saved nothing
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                trainer.save_checkpoint(Path(callback.dirpath) / "last.ckpt")
