"""Makes a student small while a frozen teacher tells it what to say."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.detection import LossSettings, OptimizerSettings, RetinaFaceModule, require_same
from retinaface.compression.distillation import distillation_loss
from retinaface.compression.structure import Network, load_network
from retinaface.errors import InputError
from retinaface.model.network import Activation, normalize


@dataclass(frozen=True)
class DistillationSettings:
    """How much the teacher counts; see :func:`retinaface.compression.distillation.distillation_loss`.

    Attributes:
        weight: Share of the distillation loss, 0 to 1; the labels have the rest.
        temperature: Softens the class distributions.
        confidence: Teacher's face score from which its boxes and landmarks are learnt.
    """

    weight: float = 0.7
    temperature: float = 3.0
    confidence: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"distillation: weight is {self.weight}; expected a share from 0 to 1")
        if self.temperature <= 0:
            raise InputError(
                f"distillation: temperature is {self.temperature}; expected more than 0 (1 softens nothing)"
            )


class CompressionModule(RetinaFaceModule):
    """A student (``network``) and its frozen teacher.

    What makes the student small is done by callbacks: ``callbacks.ChannelPruning``, then, in a stage of its own,
    ``callbacks.QuantizationAwareTraining``. The teacher is not in the checkpoint.

    Args:
        student: Checkpoint that the student starts from (.ckpt or .pth). Needed to train; a checkpoint of this module
            holds all that it takes to evaluate.
        teacher: Checkpoint of the teacher, with the student's anchors; None trains on the labels alone.
        activation: Activation of the student instead of the one in its checkpoint: ``relu`` is faster in INT8.
        distillation: How much the teacher counts.
        optimizer: Optimizer and schedule.
        loss: Target assignment and loss against the labels.

    Raises:
        InputError: A checkpoint cannot be read, the student is quantized, or the teacher's anchors are not the
            student's.
    """

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        activation: Activation | None = None,
        distillation: DistillationSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        loss: LossSettings | None = None,
    ) -> None:
        super().__init__(weights=student, activation=activation, optimizer=optimizer, loss=loss)
        self.distillation = distillation or DistillationSettings()
        self._has_student = student is not None
        self.teacher: Network | None = None
        if teacher is not None:
            self.teacher, structure = load_network(teacher)
            self.teacher.requires_grad_(False)
            require_same("a teacher", teacher, structure.network, self.structure.network, ("anchor_sizes", "strides"))

    @property
    def student(self) -> Network:
        """The network that is made small."""
        return self.network

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and not self._has_student:
            raise InputError(
                "student: none given; give the checkpoint to start from with --model.init_args.student FILE"
            )

    @override
    def train(self, mode: bool = True) -> "CompressionModule":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = normalize(batch["images"])
        outputs = self.student(images)
        task = self.task_loss(outputs, batch)
        self.log_losses("train", task, len(images))
        if self.teacher is None:
            return task.total
        with torch.no_grad():
            wanted = self.teacher(images)
        distilled = distillation_loss(outputs, wanted, self.distillation.temperature, self.distillation.confidence)
        self.log_losses("distillation", distilled, len(images))
        return self.distillation.weight * distilled.total + (1 - self.distillation.weight) * task.total

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        weights = checkpoint["state_dict"]
        for key in [key for key in weights if key.startswith("teacher.")]:
            del weights[key]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.teacher is not None:  # it keeps the weights that it has, and everything else must match
            checkpoint["state_dict"].update({f"teacher.{k}": v for k, v in self.teacher.state_dict().items()})
