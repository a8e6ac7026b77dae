"""Makes a student small while a frozen teacher tells it what to say."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.detection import (
    LossSettings,
    OptimizerSettings,
    RetinaFaceModule,
    rate_factors,
    require_same,
)
from retinaface.compression.distillation import DistillationSettings, distillation_losses
from retinaface.compression.features import FeatureTap, feature_widths, make_adapters
from retinaface.compression.structure import Network, load_network
from retinaface.errors import InputError
from retinaface.model.losses import mean_over_processes, shared_divisor
from retinaface.model.network import Activation, Outputs


class CompressionModule(RetinaFaceModule):
    """A student (``network``) and its frozen teacher.

    What makes the student small is done by callbacks: ``callbacks.ChannelPruning``, then, in a stage of its own,
    ``callbacks.QuantizationAwareTraining``. The teacher is not in the checkpoint. ``adapters``, which bring the
    student's features to the teacher's widths where features are distilled, are trained and in the checkpoint, but no
    part of the student: whatever reads a checkpoint for its network leaves them. Where no loss reaches a part of the
    student (``DistillationSettings.untaught``), its parameters rest.

    Args:
        student: Checkpoint that the student starts from (.ckpt or .pth). Needed to train; a checkpoint of this module
            holds all that it takes to evaluate.
        teacher: Checkpoint of the teacher, with the student's anchors; None trains on the labels alone.
        activation: Activation of the student instead of the one in its checkpoint: ``relu`` is faster in INT8.
        keep_leaky_relu: With it, modules that keep LeakyReLU: those that stay in float, such as ``[backbone.*1]``;
            None: those that the checkpoint says.
        distillation: How much the teacher counts.
        optimizer: Optimizer and schedule.
        loss: Target assignment and loss against the labels.
        compile_network: Whether to compile the student, as in :class:`RetinaFaceModule`; the teacher has a setting of
            its own in ``distillation``.
        channels_last: As in :class:`RetinaFaceModule`, for student and teacher.

    Raises:
        InputError: A checkpoint cannot be read, the student is quantized, the teacher's anchors are not the student's,
            or a compiled student is to be taught features; when a fit goes on, its checkpoint was trained with other
            adapters.
    """

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        activation: Activation | None = None,
        keep_leaky_relu: Sequence[str] | None = None,
        distillation: DistillationSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        loss: LossSettings | None = None,
        compile_network: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__(
            weights=student,
            activation=activation,
            keep_leaky_relu=keep_leaky_relu,
            optimizer=optimizer,
            loss=loss,
            compile_network=compile_network,
            channels_last=channels_last,
        )
        self.distillation = distillation or DistillationSettings()
        self._has_student = student is not None
        self.adapters = nn.ModuleList()
        self._teacher_tap: FeatureTap | None = None
        self.teacher: Network | None = None
        if teacher is not None:
            self.teacher, structure = load_network(teacher)
            self.teacher.requires_grad_(False)
            require_same("a teacher", teacher, structure.network, self.structure.network, ("anchor_sizes", "strides"))
        if compile_network and self._teaches_features:
            raise InputError(
                "model: compile_network is set, but the features of a compiled student cannot be seen; leave it out, "
                "or set distillation.features to 0"
            )

    @property
    def student(self) -> Network:
        """The network that is made small."""
        return self.network

    def require_student(self) -> None:
        """Raises an :class:`InputError` where there is nothing to compress."""
        if not self._has_student:
            raise InputError(
                "student: none given; give the checkpoint to start from with --model.init_args.student FILE"
            )

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.require_student()

    @override
    def train(self, mode: bool = True) -> "CompressionModule":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @override
    def configure_model(self) -> None:
        """Makes the adapters when a fit begins: callbacks have given the student its shape in their ``setup``."""
        super().configure_model()
        if self.teacher is not None:
            # Every process has read it from its file, and it never changes: nothing to send to the others, in any step.
            named = [*self.teacher.named_parameters(), *self.teacher.named_buffers()]
            self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name, _ in named]
        if self._fits and self._teaches_features and self._teacher_tap is None:
            assert self.teacher is not None
            self._make_adapters()
            self._teacher_tap = FeatureTap(self.teacher, self.distillation.feature_levels)

    @property
    def _teaches(self) -> bool:
        return self.teacher is not None and self.distillation.weight > 0

    @property
    def _teaches_features(self) -> bool:
        return self._teaches and self.distillation.features > 0

    @override
    def _leave_out_gradients(self) -> None:
        super()._leave_out_gradients()
        if self._fits and self._teaches:
            # They would have no gradients, which several processes take for a mistake.
            for parameter in rate_factors(self.network, dict.fromkeys(self.distillation.untaught, 0.0)):
                parameter.requires_grad_(False)

    def _make_adapters(self) -> None:
        assert self.teacher is not None
        levels = self.distillation.feature_levels
        self.adapters = make_adapters(feature_widths(self.student, levels), feature_widths(self.teacher, levels))

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._teaches and self.distillation.compile_teacher:
            assert self.teacher is not None
            self.teacher.compile(dynamic=True)  # in place, so that names of weights stay the same

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss against the labels and the teacher, logged by part."""
        images = self.training_images(batch)
        tap = FeatureTap(self.student, self.distillation.feature_levels) if self._teaches_features else None
        with tap or nullcontext():
            outputs = self.training_outputs(images)
        if not self._teaches:
            return self.logged_task_loss(outputs, batch)
        share = self.distillation.weight
        if share == 1:
            return self._distillation_loss(images, outputs, tap)
        task = self.logged_task_loss(outputs, batch)
        return share * self._distillation_loss(images, outputs, tap) + (1 - share) * task

    def _distillation_loss(self, images: Tensor, outputs: Outputs, tap: FeatureTap | None) -> Tensor:
        assert self.teacher is not None
        with self.profiled("teacher"), torch.no_grad(), self._teacher_context(images.device.type):
            wanted = self.teacher(images)
        with self.profiled("loss"):
            own_features: list[Tensor] = []
            wanted_features: list[Tensor] = []
            if tap is not None and self._teacher_tap is not None:
                own_features = [adapt(maps) for adapt, maps in zip(self.adapters, tap.features, strict=True)]
                wanted_features = self._teacher_tap.features
            losses = distillation_losses(
                outputs,
                wanted,
                self.distillation,
                own_features,
                wanted_features,
                divisor=shared_divisor,
                mean=mean_over_processes,
            )
            total = sum(losses.values(), start=images.new_zeros(()))
        self.log_losses("distillation", losses, total, len(images))
        return total

    def _teacher_context(self, device: str) -> AbstractContextManager[Any]:
        """What the teacher computes in; the trainer's precision is set around every step."""
        precision = self.distillation.teacher_precision
        if precision is None:
            return nullcontext()
        return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        weights = checkpoint["state_dict"]
        for key in [key for key in weights if key.startswith("teacher.")]:
            del weights[key]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        weights = checkpoint["state_dict"]
        self._take_adapters(weights)
        if self.teacher is not None:  # it keeps the weights that it has, and everything else must match
            weights.update({f"teacher.{k}": v for k, v in self.teacher.state_dict().items()})

    def _take_adapters(self, weights: dict[str, Tensor]) -> None:
        """Makes room for a checkpoint's adapters where training goes on, and leaves them out everywhere else."""
        found = {key for key in weights if key.startswith("adapters.")}
        if not self._fits:
            for key in found:
                del weights[key]
            return
        if self._teaches_features:
            self._make_adapters()
        if found != {f"adapters.{key}" for key in self.adapters.state_dict()}:
            raise InputError(
                f"{self.trainer.ckpt_path}: was trained with another distillation of features, which cannot change "
                "within a fit; set what it began with, or give the checkpoint as the student "
                "(--model.init_args.student)"
            )
