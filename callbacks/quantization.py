"""Trains the student with the rounding of INT8."""

from collections.abc import Sequence

import lightning as L
from typing_extensions import override

from lightning_modules import RetinaFaceModule
from retinaface.compression.quantization import (
    HEADS,
    FakeQuantizedRetinaFace,
    QuantizationSettings,
    prepare_for_training,
)
from retinaface.compression.quantizer import BackendName
from retinaface.errors import InputError
from retinaface.model.network import RetinaFace


class QuantizationAwareTraining(L.Callback):
    """Inserts fake-quantization when a fit begins, and lets ranges and batch statistics settle before it ends.

    It acts in ``setup``, like :class:`callbacks.ChannelPruning` and for the same reasons.

    Args:
        keep_float: Modules, with all below them, that stay in float, such as ``backbone.stage1`` or ``class_heads``.
        averaging: Weight of the newest batch in the moving average of each activation's range.
        freeze_at: Share of the epochs after which the ranges of the activations stand still, above 0 (they need data
            first), up to 1 (never).
        freeze_statistics_at: The same for the statistics of the batch norms; by default together with the ranges.
        backend: The runtime that it is for: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        weight_bits: 8, or 7 for CPUs without VNNI.

    Raises:
        InputError: A number is out of range; when a fit begins, ``keep_float`` names an unknown module, the network is
            quantized already, or the fit goes on from a checkpoint that was not prepared for INT8.
    """

    def __init__(
        self,
        keep_float: Sequence[str] = HEADS,
        averaging: float = 0.02,
        freeze_at: float = 0.5,
        freeze_statistics_at: float | None = None,
        backend: BackendName = "onnxruntime",
        weight_bits: int = 8,
    ) -> None:
        self.settings = QuantizationSettings(tuple(keep_float), averaging, backend, weight_bits)
        self.freeze_at = freeze_at
        self.freeze_statistics_at = freeze_at if freeze_statistics_at is None else freeze_statistics_at
        for name in ("freeze_at", "freeze_statistics_at"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(
                    f"quantization: {name} is {getattr(self, name)}; expected a share of the epochs above 0, up to 1"
                )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, RetinaFaceModule)
        if not isinstance(pl_module.network, RetinaFace):
            raise InputError("quantization: the network is quantized already; give the checkpoint of the stage before")
        pl_module.network = prepare_for_training(pl_module.network, self.settings)
        pl_module.structure.quantization = self.settings

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RetinaFaceModule)
        # A checkpoint to go on from brings its own structure, and it may be that of another stage.
        if pl_module.structure.quantization is None:
            raise InputError(
                f"{trainer.ckpt_path}: was not prepared for INT8, so quantization-aware training cannot go on from it; "
                "give it as the student (--model.init_args.student)"
            )

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module.network, FakeQuantizedRetinaFace)
        epochs = trainer.max_epochs or -1
        done = trainer.current_epoch / epochs if epochs > 0 else 0.0
        pl_module.network.ranges_frozen = done >= self.freeze_at
        pl_module.network.statistics_frozen = done >= self.freeze_statistics_at
