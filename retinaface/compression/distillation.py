"""Distillation: the student learns to say what the frozen teacher says (arXiv:1503.02531).

Everything is computed in float32, whatever the networks compute in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss  # type: ignore[import-untyped]

from retinaface.compression.features import FeatureLevels
from retinaface.errors import InputError
from retinaface.model.boxes import VARIANCES, decode_boxes
from retinaface.model.losses import Divisor, Mean, own_divisor, own_mean
from retinaface.model.network import Outputs, face_logit

Part = Literal["logits", "boxes", "landmarks", "features"]
BoxLoss = Literal["smooth_l1", "giou"]
FeatureLoss = Literal["pkd", "cwd", "mse"]
Precision = Literal["float32", "bfloat16"]

# Rows (C, N) without their means, and these (C,).
_Centred = tuple[Tensor, Tensor]

# Boxes beyond 1000 / 16 times their anchor's side, or below the inverse, are as good as these: exp() must not overflow.
_LARGEST_LOG_SIZE = 4.135

# Product of two variances below which a channel counts as constant.
_SMALLEST_VARIANCE = 1e-12
# Added to the variance of a channel by which errors are divided: what is below counts as constant.
_NOISE = 1e-4


@dataclass(frozen=True)
class DistillationSettings:
    """What the teacher teaches, and how much that counts.

    With a ``weight`` of 1 some modules may learn nothing, see :attr:`untaught`.

    Attributes:
        weight: Share of the distillation loss, 0 to 1; the labels have the rest. At 1 no labels are needed, and the
            loss against them is not computed; at 0 the teacher is not asked.
        temperature: Softens the class distributions, and with ``cwd`` those over the positions.
        confidence: Teacher's face score from which its boxes and landmarks are learnt.
        logits: Weight of the class logits, see :func:`logit_distillation`. As every weight of a part: at 0 that part is
            neither computed nor logged.
        boxes: Weight of the boxes.
        landmarks: Weight of the landmarks, see :func:`landmark_distillation`.
        features: Weight of the features.
        box_loss: ``smooth_l1``, see :func:`box_distillation`, or ``giou``, see :func:`giou_distillation`.
        feature_loss: ``pkd``, see :func:`pearson_distillation`, ``cwd``, see :func:`channel_distillation`, or ``mse``,
            see :func:`hint_distillation`.
        feature_levels: ``fpn``, the levels of the pyramid, ``ssh``, those of the context modules, or ``all``: both, and
            the backbone's that the pyramid is made of.
        teacher_precision: What the teacher computes in: ``float32`` or ``bfloat16``; by default what the trainer's
            precision says. On a CPU without instructions for bfloat16 that is far slower (24x in a measurement:
            mobilenet0.25, 416x416, batch 8, one thread of an AMD EPYC).
        compile_teacher: Whether to compile the teacher with ``torch.compile``, for any size of picture. On that CPU
            it ran 8 % faster, after 2 minutes of compiling, and as long again for the first other size.
    """

    weight: float = 0.7
    temperature: float = 3.0
    confidence: float = 0.3
    logits: float = 1.0
    boxes: float = 1.0
    landmarks: float = 1.0
    features: float = 0.0
    box_loss: BoxLoss = "smooth_l1"
    feature_loss: FeatureLoss = "pkd"
    feature_levels: FeatureLevels = "fpn"
    teacher_precision: Precision | None = None
    compile_teacher: bool = False

    def __post_init__(self) -> None:
        for name, highest, expected in (
            ("weight", 1.0, "a share from 0 to 1"),
            ("confidence", 1.0, "a score from 0 to 1"),
            *((part, float("inf"), "a weight of 0 or more") for part in get_args(Part)),
        ):
            if not 0 <= getattr(self, name) <= highest:
                raise InputError(f"distillation: {name} is {getattr(self, name)}; expected {expected}")
        if self.temperature <= 0:
            raise InputError(
                f"distillation: temperature is {self.temperature}; expected more than 0 (1 softens nothing)"
            )
        for name, choices in (
            ("box_loss", get_args(BoxLoss)),
            ("feature_loss", get_args(FeatureLoss)),
            ("feature_levels", get_args(FeatureLevels)),
            ("teacher_precision", (*get_args(Precision), None)),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"distillation: {name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, choices))}"
                )
        if self.weight and not any(getattr(self, part) for part in get_args(Part)):
            raise InputError(
                "distillation: logits, boxes, landmarks and features are all 0; expected one above 0, or a weight of 0"
            )

    @property
    def untaught(self) -> list[str]:
        """Modules of the student that no loss reaches.

        These are heads without a part and, where nothing but the pyramid's features is learnt, all between it and them.
        """
        if self.weight < 1:
            return []  # the labels reach everything
        heads = {"class_heads": self.logits, "box_heads": self.boxes, "landmark_heads": self.landmarks}
        untaught = [name for name, weight in heads.items() if not weight]
        return [*untaught, "ssh"] if len(untaught) == len(heads) and self.feature_levels == "fpn" else untaught


def distillation_losses(
    student: Outputs,
    teacher: Outputs,
    settings: DistillationSettings,
    student_features: Sequence[Tensor] = (),
    teacher_features: Sequence[Tensor] = (),
    divisor: Divisor = own_divisor,
    mean: Mean = own_mean,
) -> dict[Part, Tensor]:
    """How far the student is from what the teacher says, by part.

    Args:
        student: ``class_logits (B, A, 2)``, ``box_deltas (B, A, 4)``, ``landmark_deltas (B, A, 10)``.
        teacher: The same from the teacher, without gradients.
        settings: Which parts, and how.
        student_features: ``(B, C, H, W)`` per level, in the teacher's widths; needed where features have a weight.
        teacher_features: The same from the teacher, without gradients.
        divisor: What to divide by, from the sums of both weights of the anchors, :func:`class_weight` and
            :func:`teacher_certainty`.
        mean: What makes the statistics of all pictures, for ``pkd`` and ``mse``, from those of the pictures given here.

    Returns:
        Weighted scalars, finite also where the teacher sees no face; their sum is the loss. Parts without a weight are
        left out.
    """
    student_logits, student_boxes, student_landmarks = (output.float() for output in student)
    teacher_logits, teacher_boxes, teacher_landmarks = (output.float() for output in teacher)
    weight = class_weight(student_logits, teacher_logits)
    certainty = teacher_certainty(teacher_logits, settings.confidence)
    # Together, as each call may be an exchange between processes.
    weights, certainties = divisor(torch.stack([weight.sum(), certainty.sum()])).unbind()
    losses: dict[Part, Tensor] = {}
    if settings.logits:
        divergence = logit_distillation(student_logits, teacher_logits, settings.temperature, weight)
        losses["logits"] = settings.logits * (divergence / weights)
    if settings.boxes:
        of_boxes = box_distillation if settings.box_loss == "smooth_l1" else giou_distillation
        losses["boxes"] = settings.boxes * (of_boxes(student_boxes, teacher_boxes, certainty) / certainties)
    if settings.landmarks:
        error = landmark_distillation(student_landmarks, teacher_landmarks, certainty)
        losses["landmarks"] = settings.landmarks * (error / certainties)
    if settings.features:
        levels = zip(student_features, teacher_features, strict=True)
        if settings.feature_loss == "pkd":
            of_levels = [pearson_distillation(own, wanted, mean) for own, wanted in levels]
        elif settings.feature_loss == "cwd":
            of_levels = [channel_distillation(own, wanted, settings.temperature) for own, wanted in levels]
        else:
            of_levels = [hint_distillation(own, wanted, mean) for own, wanted in levels]
        losses["features"] = settings.features * torch.stack(of_levels).mean()
    return losses


def teacher_certainty(teacher_logits: Tensor, confidence: float) -> Tensor:
    """How much the teacher's box and landmarks at each anchor are worth.

    Args:
        teacher_logits: ``(B, A, 2)`` float32.
        confidence: Score from which they are worth anything.

    Returns:
        ``(B, A)``: the teacher's face score, 0 where it is below ``confidence``.
    """
    score = face_logit(teacher_logits).sigmoid()
    return torch.where(score >= confidence, score, 0.0)


def class_weight(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How much the class distribution of each anchor counts: the larger of the two face scores.

    So faces, the teacher's doubts and the student's false alarms count, not the 99 % of background that both are sure
    of.

    Args:
        student_logits: ``(B, A, 2)`` float32.
        teacher_logits: ``(B, A, 2)`` float32.

    Returns:
        ``(B, A)``, without gradients.
    """
    return torch.maximum(face_logit(student_logits), face_logit(teacher_logits)).sigmoid().detach()


def logit_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float, weight: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the teacher's to the student's softened class distribution.

    Scaled by the squared temperature as in arXiv:1503.02531.

    Args:
        student_logits: ``(B, A, 2)``.
        teacher_logits: ``(B, A, 2)``.
        temperature: Softens both.
        weight: ``(B, A)``, of each anchor, from :func:`class_weight`.

    Returns:
        A scalar, the weighted sum.
    """
    own, wanted = (face_logit(logits) / temperature for logits in (student_logits, teacher_logits))
    score = wanted.sigmoid()
    # The divergence is what the cross-entropy has beyond the teacher's own entropy.
    cross_entropy, entropy = (
        F.binary_cross_entropy_with_logits(margin, score, reduction="none") for margin in (own, wanted)
    )
    return temperature**2 * (weight * (cross_entropy - entropy)).sum()


def box_distillation(student_deltas: Tensor, teacher_deltas: Tensor, certainty: Tensor) -> Tensor:
    """Smooth-L1 between deltas where the teacher is certain, as in the detection loss (arXiv:1504.08083).

    Args:
        student_deltas: ``(B, A, 4)`` float32, or as many as there are to an anchor.
        teacher_deltas: The same from the teacher.
        certainty: ``(B, A)``, weight of each anchor, from :func:`teacher_certainty`.

    Returns:
        A scalar, the weighted sum; 0, with gradients of 0, where the weights are all 0.
    """
    return (F.smooth_l1_loss(student_deltas, teacher_deltas, reduction="none") * certainty[..., None]).sum()


def landmark_distillation(student_deltas: Tensor, teacher_deltas: Tensor, certainty: Tensor) -> Tensor:
    """As :func:`box_distillation`, for the ``(B, A, 10)`` deltas of landmarks."""
    return box_distillation(student_deltas, teacher_deltas, certainty)


def giou_distillation(student_deltas: Tensor, teacher_deltas: Tensor, certainty: Tensor) -> Tensor:
    """1 - GIoU (arXiv:1902.09630) between the student's and the teacher's box where the teacher is certain.

    Boxes are decoded relative to their anchor, as GIoU is the same in every scale. Sides beyond 62.5 times the
    anchor's count as that, and pass no gradient, so that an untrained student has a finite loss. torchvision's function
    chooses boxes by a mask, for which Python waits for a GPU; no other part of the losses does.

    Args:
        student_deltas: ``(B, A, 4)`` float32.
        teacher_deltas: ``(B, A, 4)`` float32.
        certainty: ``(B, A)``, weight of each anchor, from :func:`teacher_certainty`.

    Returns:
        A scalar, the weighted sum; 0, with gradients of 0, where the weights are all 0.
    """
    own, wanted = (_decode_relative(deltas) for deltas in (student_deltas, teacher_deltas))
    errors: Tensor = generalized_box_iou_loss(own, wanted, reduction="none")
    return (errors * certainty).sum()


def _decode_relative(deltas: Tensor) -> Tensor:
    """Boxes ``(..., 4)`` xyxy in units of their anchor's sides, from its centre."""
    centre, size = deltas.split(2, dim=-1)
    largest = _LARGEST_LOG_SIZE / VARIANCES[1]
    return decode_boxes(
        torch.cat([centre, size.clamp(-largest, largest)], dim=-1),
        torch.cat([torch.zeros_like(centre), torch.ones_like(size)], dim=-1),
    )


def pearson_distillation(student: Tensor, teacher: Tensor, mean: Mean = own_mean) -> Tensor:
    """1 - Pearson's correlation of each channel over the batch and its positions (PKD, arXiv:2207.02039).

    That is half the mean squared error between features standardised per channel: size and offset of the features do
    not matter, only their pattern. A channel that is the same everywhere has no pattern; it counts as uncorrelated, and
    passes no gradient.

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C, H, W)``.
        mean: Makes statistics of all pictures from those of these.

    Returns:
        A scalar from 0 to 2, the mean over the channels.
    """
    own, wanted = (_centred(maps.float().transpose(0, 1).flatten(1)) for maps in (student, teacher))
    own_variance, wanted_variance, covariance = _covariances([(own, own), (wanted, wanted), (own, wanted)], mean)
    variances = own_variance * wanted_variance
    varies = variances > _SMALLEST_VARIANCE
    return (1 - torch.where(varies, covariance, 0.0) / torch.where(varies, variances, 1.0).sqrt()).mean()


def _centred(rows: Tensor) -> _Centred:
    means = rows.mean(dim=1)
    return rows - means[:, None], means


def _covariances(pairs: Sequence[tuple[_Centred, _Centred]], mean: Mean) -> Tensor:
    """Covariances ``(pairs, C)`` of rows over the pictures of all processes, in one exchange between them."""
    within = torch.stack([(values * others).mean(dim=1) for (values, _), (others, _) in pairs])
    means, other_means = (torch.stack([pair[side][1] for pair in pairs]) for side in (0, 1))
    # That of all is the mean of those within each process, and the covariance of the processes' means.
    within, products, means, other_means = mean(torch.stack([within, means * other_means, means, other_means])).unbind()
    return within + (products - means * other_means)


def channel_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence over the positions of each channel of each picture (CWD, arXiv:2011.13256).

    Each channel is a distribution over where something is: what stands out counts, not the background. Scaled by the
    squared temperature.

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C, H, W)``.
        temperature: Softens both.

    Returns:
        A scalar, the mean over pictures and channels.
    """
    own, wanted = (F.log_softmax(maps.float().flatten(2) / temperature, dim=-1) for maps in (student, teacher))
    divergence = F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergence.mean()


def hint_distillation(student: Tensor, teacher: Tensor, mean: Mean = own_mean) -> Tensor:
    """Mean squared error of each channel, relative to the teacher's variance (FitNets, arXiv:1412.6550).

    The features themselves are to be met, as the teacher's later layers would need them: the loss for a student that
    begins as its teacher, and has since lost an activation function, some precision or channels.

    Args:
        student: ``(B, C, H, W)``.
        teacher: ``(B, C, H, W)``.
        mean: Makes statistics of all pictures from those of these.

    Returns:
        A scalar, the mean over the channels; 1 for a student that puts out the mean of every channel.
    """
    own, wanted = (maps.float().transpose(0, 1).flatten(1) for maps in (student, teacher))
    errors = (own - wanted).square().mean(dim=1)
    centred = _centred(wanted)
    variances = _covariances([(centred, centred)], mean)[0]
    return (errors / (variances + _NOISE)).mean()
