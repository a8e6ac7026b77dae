"""Trains and evaluates one detector."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from retinaface.compression.quantization import FakeQuantizedRetinaFace
from retinaface.compression.structure import Network, Structure, load_float_network
from retinaface.errors import InputError
from retinaface.evaluation.protocols import NMS_THRESHOLD, SCORE_THRESHOLD
from retinaface.evaluation.wider_ap import WiderFaceAP
from retinaface.model.anchors import make_anchors, picture_size
from retinaface.model.checkpoints import load_imagenet_backbone
from retinaface.model.losses import Divisor, Losses, assign_targets, detection_loss, own_divisor, shared_divisor
from retinaface.model.network import (
    Activation,
    NetworkConfig,
    Outputs,
    RetinaFace,
    matching_modules,
    normalize,
    pad_small,
    with_activation,
)
from retinaface.model.postprocess import Detections, postprocess


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101) with a linear warm-up and a cosine decay (arXiv:1608.03983) over the whole stage.

    The stage is the trainer's ``max_epochs``, also where it is stopped before. A plain cosine down to 1e-4, as in many
    tutorials, is ``warmup: 0.0`` with ``final_learning_rate: 1.0e-4``.

    Attributes:
        learning_rate: At the end of the warm-up.
        final_learning_rate: At the end of the stage.
        warmup: Share of the stage's steps.
        weight_decay: For convolution weights; biases and batch norms have none.
        rates: Modules, with all below them, to a factor of the learning rate, from the first step to the last:
            ``{backbone: 0.1}``. Names are as in :func:`retinaface.model.network.matching_modules`, also those of a
            fake-quantized network; where several hold a parameter, the last counts. With 0 parameters and batch
            statistics stay as they are, for which no gradients are computed; the statistics of a fake-quantized network
            follow its callback.
    """

    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 5e-4
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.final_learning_rate < 0:
            raise InputError(
                f"optimizer: learning_rate is {self.learning_rate} and final_learning_rate {self.final_learning_rate}; "
                "expected one above 0 and one of 0 or more"
            )
        if not 0 <= self.warmup <= 1:
            raise InputError(f"optimizer: warmup is {self.warmup}; expected a share of the steps from 0 to 1")
        for name, factor in self.rates.items():
            if factor < 0:
                raise InputError(f"optimizer: rates gives {name} {factor}; expected a factor of 0 or more")


@dataclass(frozen=True)
class LossSettings:
    """See :func:`retinaface.model.losses.assign_targets` and :func:`retinaface.model.losses.detection_loss`.

    Attributes:
        iou_threshold: Overlap from which an anchor stands for a face.
        negatives_per_positive: Background anchors that count, the hardest ones, for each that stands for a face.
        box_weight: Weight of the box loss; the classification loss has 1.
        landmark_weight: Weight of the landmark loss.
    """

    iou_threshold: float = 0.35
    negatives_per_positive: int = 7
    box_weight: float = 2.0
    landmark_weight: float = 1.0


class RetinaFaceModule(L.LightningModule):
    """One detector, trained on labels.

    The network's structure (configuration, what pruning removed, how it was quantized) travels in the checkpoint as
    plain values, and the network is built anew from it when a checkpoint is loaded.

    Args:
        network: The network to build. With ``weights``, which say it better: what backbone and anchors they must have.
        weights: Public RetinaFace file (.pth) or one of this project's checkpoints (.ckpt) to start from.
        activation: Activation to train with from now on instead of the one in ``weights`` or ``network``.
        keep_leaky_relu: With an ``activation`` of ``relu``, modules that keep LeakyReLU: ``[backbone.*1]``; None: those
            that ``weights`` or ``network`` say.
        backbone_weights: File with ImageNet weights of the backbone, or ``imagenet`` for torchvision's; only without
            ``weights``.
        optimizer: Optimizer and schedule.
        loss: Target assignment and loss.
        compile_network: Whether to compile the network with ``torch.compile`` for training, for pictures of one size;
            validation runs it as it is.
        channels_last: Whether training computes with the channels of a pixel side by side in memory; by default on a
            CPU only. There the forward pass of mobilenet0.25 took a third less time and the whole step 8 %
            (``train.py benchmark`` compares them elsewhere); GPUs may gain with ``bf16-mixed``.

    Raises:
        InputError: The weights cannot be read, or are those of another network than ``network``; ``keep_leaky_relu``
            is given without an ``activation`` of ``relu``, or names what is not there; when a fit begins, the
            network is to be compiled and is fake-quantized, batch norms are to be synchronised without GPUs, or the
            trainer's precision would have the weights in another type than float32.
    """

    def __init__(
        self,
        network: NetworkConfig | None = None,
        weights: str | None = None,
        activation: Activation | None = None,
        keep_leaky_relu: Sequence[str] | None = None,
        backbone_weights: str | None = None,
        optimizer: OptimizerSettings | None = None,
        loss: LossSettings | None = None,
        compile_network: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer or OptimizerSettings()
        self.loss = loss or LossSettings()
        self.compile_network = compile_network
        self.channels_last = channels_last
        self._compiled: Callable[[Tensor], Outputs] | None = None
        self.network: Network
        if keep_leaky_relu and activation != "relu":
            raise InputError("model: keep_leaky_relu says where LeakyReLU stays with activation: relu; set that too")
        if weights is None:
            self.structure = Structure(with_activation(network or NetworkConfig(), activation, keep_leaky_relu))
            self.network = self.structure.build()
            if backbone_weights is not None:
                assert isinstance(self.network, RetinaFace)
                load_imagenet_backbone(self.network, backbone_weights)
        else:
            self.network, self.structure = load_float_network(weights, activation, keep_leaky_relu)
            if network is not None:
                require_same(
                    "weights", weights, self.structure.network, network, ("backbone", "anchor_sizes", "strides")
                )
        self.network.train()
        self.val_ap = WiderFaceAP()

    def forward(self, images: Tensor) -> Outputs:
        """Raw outputs for ``(B, 3, H, W)`` uint8 BGR pictures; see :class:`retinaface.model.network.RetinaFace`."""
        outputs: Outputs = self.network(normalize(images))
        return outputs

    @override
    def configure_model(self) -> None:
        """Callbacks have given the network its shape, and it is not wrapped for several processes yet."""
        self._leave_out_gradients()

    @property
    def _fits(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def _leave_out_gradients(self) -> None:
        for parameter, factor in rate_factors(self.network, self.optimizer.rates if self._fits else {}).items():
            parameter.requires_grad_(factor > 0)

    @override
    def on_fit_start(self) -> None:
        """Compiles the network as callbacks have made it in their ``setup``, or a checkpoint; lets statistics rest."""
        if next(self.network.parameters()).dtype != torch.float32:
            raise InputError(
                f"trainer: with precision {self.trainer.precision} weights are not float32, which they must be here; "
                "set 32-true or bf16-mixed"
            )
        if getattr(self.trainer.strategy, "_layer_sync", None) is not None:
            self._check_sync_batchnorm()
        if self.compile_network and isinstance(self.network, FakeQuantizedRetinaFace):
            raise InputError(
                "model: compile_network is set, but a fake-quantized network changes its code while it is trained; "
                "leave it out in this stage"
            )
        factors = rate_factors(self.network, self.optimizer.rates)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm) and factors.get(module.weight) == 0:
                module.eval()  # the trainer leaves modules in their modes
        # The forward method alone: a compiled module would stand in the checkpoint under names of its own.
        self._compiled = torch.compile(self.network.forward, dynamic=False) if self.compile_network else None

    def _check_sync_batchnorm(self) -> None:
        if isinstance(self.network, FakeQuantizedRetinaFace):
            rank_zero_warn(
                "model: trainer.sync_batchnorm does not reach the batch norms of a fake-quantized network; each "
                "process normalizes with the statistics of its own pictures"
            )
        elif self.trainer.strategy.root_device.type == "cpu":
            raise InputError(
                "trainer: sync_batchnorm needs GPUs, torch cannot do it on CPUs; set it to false, or accelerator to gpu"
            )

    def training_images(self, batch: dict[str, Any]) -> Tensor:
        """Pictures of a training batch as from :func:`retinaface.model.network.normalize`, arranged in memory."""
        images = normalize(batch["images"])
        # Convolutions follow their input, so the weights, and what is saved of them, stay as they are.
        channels_last = images.device.type == "cpu" if self.channels_last is None else self.channels_last
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images

    def training_outputs(self, images: Tensor) -> Outputs:
        """Outputs for what :meth:`training_images` gives, compiled if that is asked for; profiled as ``forward``."""
        with self.profiled("forward"):
            outputs: Outputs = (self._compiled or self.network)(images)
        return outputs

    def profiled(self, part: str) -> AbstractContextManager[Any]:
        """Names a part of the training step to the trainer's profiler; see :mod:`lightning_modules.step_benchmark`."""
        if self._trainer is None:
            return nullcontext()
        return self.trainer.profiler.profile(part)  # type: ignore[attr-defined, no-any-return]

    def task_loss(self, outputs: Outputs, batch: dict[str, Any], divisor: Divisor = own_divisor) -> Losses:
        """Loss against the labels of a training batch; ``divisor`` as in ``detection_loss``."""
        height, width = batch["images"].shape[-2:]
        config = self.structure.network
        device = batch["boxes"].device
        anchors = make_anchors(height, width, config.anchor_sizes, config.strides, device)
        scale = picture_size(height, width, device)
        targets = assign_targets(
            batch["boxes"] / scale.repeat(2),
            batch["landmarks"] / scale,
            batch["has_landmarks"],
            batch["labels"],
            anchors,
            self.loss.iou_threshold,
        )
        return detection_loss(
            outputs,
            targets,
            self.loss.negatives_per_positive,
            self.loss.box_weight,
            self.loss.landmark_weight,
            divisor,
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, logged by part."""
        return self.logged_task_loss(self.training_outputs(self.training_images(batch)), batch)

    def logged_task_loss(self, outputs: Outputs, batch: dict[str, Any]) -> Tensor:
        """Loss against the labels, over all processes, logged by part."""
        with self.profiled("loss"):
            losses = self.task_loss(outputs, batch, shared_divisor)
        self.log_losses("train", losses._asdict(), losses.total, len(batch["images"]))
        return losses.total

    def log_losses(self, name: str, parts: Mapping[Any, Tensor], total: Tensor, batch_size: int) -> None:
        """Logs the parts of a loss as ``<name>/<part>`` and their sum as ``<name>/loss``.

        With several processes these are the first one's alone, divided as in
        :func:`retinaface.model.losses.shared_divisor`: they scatter with the faces in its photos around the mean, which
        would take one more exchange between the processes in every step.
        """
        values = {f"{name}/{part}": value.detach() for part, value in parts.items()}
        self.log_dict(values, batch_size=batch_size)
        self.log(f"{name}/loss", total.detach(), prog_bar=True, batch_size=batch_size)

    @override
    def on_validation_start(self) -> None:
        # Photos come in sizes of their own, for each of which cuDNN would try all of its ways anew.
        self._cudnn_tries = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = False

    @override
    def on_validation_end(self) -> None:
        torch.backends.cudnn.benchmark = self._cudnn_tries

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Feeds the WIDER FACE metric with what :meth:`predict_step` finds."""
        detections = self.predict_step(batch, batch_idx)
        faces = batch["labels"] > 0
        self.val_ap.update(
            batch["image_ids"],
            [torch.cat([found.boxes, found.scores[:, None]], dim=1) for found in detections],
            [boxes[mask] for boxes, mask in zip(batch["boxes"], faces, strict=True)],
            [
                {subset: counted[index][mask] for subset, counted in batch["counted"].items()}
                for index, mask in enumerate(faces)
            ],
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Detections]:
        """Faces of each photo of a validation batch: score from 0.02, NMS at 0.4, in the photos' own pixels."""
        images = pad_small(normalize(batch["images"]))
        size = (images.shape[2], images.shape[3])
        detections = postprocess(self.network(images), size, self.structure.network, SCORE_THRESHOLD, NMS_THRESHOLD)
        return [
            Detections(found.boxes / scale, found.scores, found.landmarks / scale)
            for found, scale in zip(detections, batch["scales"], strict=True)
        ]

    def on_validation_epoch_end(self) -> None:
        """Logs the average precision of every subset that the photos are labelled for."""
        average_precision = self.val_ap.compute()  # over all processes, so each has the same
        self.val_ap.reset()
        for subset, value in average_precision.items():
            self.log(f"val/ap_{subset}", value, prog_bar=subset == "all")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As :meth:`validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    @override
    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        factors = rate_factors(self.network, self.optimizer.rates)
        optimizer = torch.optim.AdamW(
            parameter_groups(trained, factors, self.optimizer), lr=self.optimizer.learning_rate
        )
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise InputError(
                "trainer.max_epochs: -1 has no end, where the learning rate could be down; give a number, or max_steps"
            )
        scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, int(steps), self.optimizer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["structure"] = self.structure.to_plain()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A callback may have pruned or quantized the present network already, before the trainer knew that it resumes:
        # start again from nothing.
        self.structure = Structure.from_plain(checkpoint["structure"])
        self.network = self.structure.build().train()
        self._leave_out_gradients()


def require_same(what: str, path: str, found: NetworkConfig, expected: NetworkConfig, fields: Sequence[str]) -> None:
    """Checks that a file's network is of the expected kind.

    Args:
        what: What the file is for.
        path: The file.
        found: Its network.
        expected: What it should be.
        fields: Names of the fields of :class:`retinaface.model.network.NetworkConfig` that must agree.

    Raises:
        InputError: Naming the first field that differs.
    """
    for name in fields:
        has, needed = getattr(found, name), getattr(expected, name)
        if has != needed:
            raise InputError(f"{path}: its {name} {has} is not {needed}; give {what} of the same network")


def rate_factors(network: Network, rates: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """Finds the parameters that have a learning rate of their own.

    Args:
        network: Float or fake-quantized.
        rates: As in :class:`OptimizerSettings`.

    Returns:
        Parameter to factor, for those that are named.

    Raises:
        InputError: A name matches nothing, or nothing that has parameters.
    """
    # An exported graph keeps its parameters in modules that are named as in the float network.
    modules = network.graph if isinstance(network, FakeQuantizedRetinaFace) else network
    factors: dict[nn.Parameter, float] = {}
    for pattern, factor in rates.items():
        names = matching_modules(modules, [pattern], "optimizer: rates")
        found = [parameter for name in names for parameter in modules.get_submodule(name).parameters()]
        if not found:
            raise InputError(
                f"optimizer: rates names {pattern}, which holds no parameters; name the module around it, or leave it "
                "out"
            )
        factors |= dict.fromkeys(found, factor)
    return factors


def parameter_groups(
    parameters: Sequence[nn.Parameter], factors: Mapping[nn.Parameter, float], settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """Sorts parameters into the groups of an optimizer, by learning rate and weight decay.

    Args:
        parameters: All that are trained.
        factors: Of the learning rate; 1 for parameters that are not in it.
        settings: The learning rate, and the weight decay of parameters with more than one dimension.

    Returns:
        The groups, higher learning rates first, and for each the decayed parameters first.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((factors.get(parameter, 1.0), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": groups[factor, decays],
            "lr": factor * settings.learning_rate,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for factor, decays in sorted(groups, reverse=True)
    ]


def learning_rate_factor(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate at a step, relative to the highest.

    Args:
        step: From 0.
        steps: In the whole stage.
        settings: Shape of the schedule.

    Returns:
        Rises linearly over the warm-up, then falls along half a cosine to the final learning rate.
    """
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    lowest = settings.final_learning_rate / settings.learning_rate
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2
