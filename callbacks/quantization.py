"""Trains the student with the rounding of INT8."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from callbacks.first_process import decided_by_first_process
from lightning_modules import RetinaFaceModule
from retinaface.compression.calibration import CalibrationPictures
from retinaface.compression.decision import data_settings, digest, kept_decision
from retinaface.compression.quantization import (
    FakeQuantizedRetinaFace,
    QuantizationSettings,
    prepare_for_training,
)
from retinaface.compression.quantizer import BackendName
from retinaface.cpus import saturates_int8
from retinaface.data.annotations import Sample, evenly_spread
from retinaface.errors import InputError
from retinaface.evaluation.mixed_precision import Choice, Trial, choose_keep_float
from retinaface.model.network import RetinaFace

_CALIBRATION_PHOTOS = 16


def network_to_quantize(module: RetinaFaceModule, settings: QuantizationSettings) -> RetinaFace:
    """The module's network, if it can be quantized; warns where the result would not run right on this machine.

    Raises:
        InputError: It is quantized already.
    """
    if not isinstance(module.network, RetinaFace):
        raise InputError("quantization: the network is quantized already; give the checkpoint of the stage before")
    if settings.weight_bits == 8 and settings.backend != "tensorrt" and saturates_int8():
        rank_zero_warn(
            "quantization: this machine's CPU has no INT8 dot products (VNNI), so sums of products of 8-bit numbers "
            "are cut off at 16 bits; set weight_bits to 7 if the model is to run on such CPUs"
        )
    return module.network


def training_samples(trainer: L.Trainer, otherwise: str) -> Sequence[Sample]:
    """The training photos of the trainer's data module.

    Raises:
        InputError: With the given message, if it has none.
    """
    samples: Sequence[Sample] | None = getattr(trainer.datamodule, "train_samples", None)  # type: ignore[attr-defined]
    if not samples:
        raise InputError(otherwise)
    return samples


class QuantizationAwareTraining(L.Callback):
    """Inserts fake-quantization when a fit begins, and lets ranges and batch statistics settle before it ends.

    It acts in ``setup``, like :class:`callbacks.ChannelPruning` and for the same reasons. The student computes in
    float32, whose rounding is that of INT8, also with the trainer's ``precision: bf16-mixed``: that reaches the teacher
    alone.

    With ``keep_float: auto`` it measures what stays in float, on training photos and this machine's CPU; see
    :func:`retinaface.evaluation.mixed_precision.choose_keep_float`. That takes some 40 exports and evaluations, a
    quarter of an hour or more, for which other processes wait. What it has chosen is written to ``keep_float.pt`` in
    the trainer's root folder at once: a fit that is killed before its first checkpoint and begins anew there, with the
    same settings and student, keeps to it. A ``fast_dev_run`` measures nothing and leaves nothing in float.

    Args:
        keep_float: Modules, with all below them, that stay in float, such as ``backbone.stage1`` or ``class_heads``; or
            ``auto``.
        averaging: Weight of the newest batch in the moving average of each activation's range.
        freeze_at: Share of the epochs after which the ranges of the activations stand still, above 0 (they need data
            first), up to 1 (never).
        freeze_statistics_at: The same for the statistics of the batch norms, also 0; by default together with the
            ranges.
        backend: The runtime that it is for: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        weight_bits: 8, or 7 for CPUs without VNNI.
        ap_budget: Largest loss of average precision (all) before training that ``auto`` allows.
        choose_photos: Training photos that ``auto`` measures it on.
        size: Side in pixels of the picture with which ``auto`` times.
        threads: Threads with which ``auto`` times; by default every physical core.

    Raises:
        InputError: A number is out of range; when a fit begins, ``keep_float`` names an unknown module, the network is
            quantized already, or the fit goes on from a checkpoint that was not prepared for INT8; ``auto`` finds no
            data module, or nothing that meets the budget, or what it has chosen cannot be written.
    """

    def __init__(
        self,
        keep_float: Literal["auto"] | Sequence[str] = (),
        averaging: float = 0.02,
        freeze_at: float = 0.5,
        freeze_statistics_at: float | None = None,
        backend: BackendName = "onnxruntime",
        weight_bits: int = 8,
        ap_budget: float = 0.01,
        choose_photos: int = 64,
        size: int = 640,
        threads: int | None = None,
    ) -> None:
        self.chooses = keep_float == "auto"
        self.settings = QuantizationSettings(() if self.chooses else tuple(keep_float), averaging, backend, weight_bits)
        if not 0 <= ap_budget < 1:
            raise InputError(f"quantization: ap_budget is {ap_budget}; expected 0 or more, below 1")
        if choose_photos < 1:
            raise InputError(f"quantization: choose_photos is {choose_photos}; expected 1 or more")
        self.ap_budget = ap_budget
        self.choose_photos = choose_photos
        self.size = size
        self.threads = threads
        self.freeze_at = freeze_at
        self.freeze_statistics_at = freeze_at if freeze_statistics_at is None else freeze_statistics_at
        self._done = 0.0  # share of the fit when its current epoch began
        if not 0 < self.freeze_at <= 1:
            raise InputError(
                f"quantization: freeze_at is {self.freeze_at}; expected a share of the epochs above 0, up to 1"
            )
        if not 0 <= self.freeze_statistics_at <= 1:
            raise InputError(
                f"quantization: freeze_statistics_at is {self.freeze_statistics_at}; expected a share of the epochs "
                "from 0 to 1"
            )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, RetinaFaceModule)
        network = network_to_quantize(pl_module, self.settings)
        settings = self.settings
        # Where the fit goes on from a checkpoint, that says what stays in float.
        if self.chooses and trainer.ckpt_path is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with isolate_rng(include_cuda=False):  # what follows must not depend on when it was chosen
                chosen = decided_by_first_process(trainer, lambda: self._choose_once(trainer, pl_module))
            settings = replace(settings, keep_float=chosen)
        pl_module.network = prepare_for_training(network, settings)
        pl_module.structure.quantization = settings

    def _choose_once(self, trainer: L.Trainer, module: RetinaFaceModule) -> tuple[str, ...]:
        """As :meth:`_choose`, kept in a file."""
        network = module.network
        assert isinstance(network, RetinaFace)
        made_for = {
            "settings": asdict(self.settings),
            "ap_budget": self.ap_budget,
            "choose_photos": self.choose_photos,
            "size": self.size,
            "threads": self.threads,
            "structure": module.structure.to_plain(),
            "student": digest(network),
            "data": data_settings(getattr(trainer, "datamodule", None)),
        }
        file = Path(trainer.default_root_dir) / "keep_float.pt"
        return kept_decision(file, made_for, lambda: self._choose(trainer, network), rank_zero_info)

    def _choose(self, trainer: L.Trainer, network: RetinaFace) -> tuple[str, ...]:
        samples = training_samples(
            trainer,
            "quantization: keep_float auto measures on training photos, so it needs a data module; give one, or name "
            "the modules",
        )
        if not all(sample.labelled for sample in samples):
            raise InputError(
                "quantization: keep_float auto measures average precision, and the training photos have no labels; "
                "name the modules"
            )
        # Ranges come from other photos than those measured on, as they will when the network is used.
        photos = evenly_spread(samples, 2 * self.choose_photos)
        pictures = CalibrationPictures(photos[1::2] or photos, _CALIBRATION_PHOTOS)
        choice = choose_keep_float(
            network, photos[::2], pictures, self.ap_budget, self.settings, self.size, self.threads, _report
        )
        _report_choice(choice)
        return choice.keep_float

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
        self._done = trainer.global_step / trainer.estimated_stepping_batches
        self._freeze(pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._freeze(pl_module)  # for a fit that goes on within an epoch, which does not start again

    def _freeze(self, module: L.LightningModule) -> None:
        assert isinstance(module.network, FakeQuantizedRetinaFace)
        module.network.ranges_frozen = self._done >= self.freeze_at
        module.network.statistics_frozen = self._done >= self.freeze_statistics_at

    @override
    def state_dict(self) -> dict[str, float]:
        return {"done": self._done}

    @override
    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._done = state_dict["done"]


def _report(trial: Trial) -> None:
    rank_zero_info(f"quantization: tried {_described(trial)}")


def _report_choice(choice: Choice) -> None:
    rank_zero_info(
        f"quantization: chose {_described(choice.chosen)}; before training it loses "
        f"{choice.whole.ap - choice.chosen.ap:.4f} of AP {choice.whole.ap:.4f} and is "
        f"{choice.chosen.speedup / choice.whole.speedup:.2f}x as fast as in float"
    )


def _described(trial: Trial) -> str:
    kept = ", ".join(trial.keep_float or ()) or "nothing"
    return f"{kept} in float: AP {trial.ap:.4f}, {trial.speedup:.2f}x as fast as INT8 everywhere"
