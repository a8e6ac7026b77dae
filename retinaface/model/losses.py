"""What the detector is trained on: target assignment and the multi-task loss.

Everything runs for the whole batch at once on its device, without loops over pictures and without waiting for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from retinaface.model.boxes import encode_boxes, encode_landmarks, pairwise_iou, to_xyxy
from retinaface.model.network import Outputs, face_logit

# Faces compared with all anchors at a time: bounds memory on crowds. CPUs are faster with pieces that caches hold (8
# pictures x 16 faces x 16,800 anchors = 9 MB), GPUs with few pieces.
_FACES_AT_A_TIME = {"cpu": 16, "cuda": 64}

# Turns the counts that sums are divided by into divisors: own_divisor or shared_divisor.
Divisor = Callable[[Tensor], Tensor]

# Makes the statistics of all pictures from those of this process's: own_mean or mean_over_processes.
Mean = Callable[[Tensor], Tensor]


class Targets(NamedTuple):
    """What each anchor should say.

    Attributes:
        labels: ``(B, A)`` int64: 1 face, 0 background, -1 neither (left out of the loss).
        box_deltas: ``(B, A, 4)`` float32; meaningful where the label is 1.
        landmark_deltas: ``(B, A, 10)`` float32; meaningful where ``has_landmarks``.
        has_landmarks: ``(B, A)`` bool; implies label 1.
    """

    labels: Tensor
    box_deltas: Tensor
    landmark_deltas: Tensor
    has_landmarks: Tensor


class Losses(NamedTuple):
    """The losses of the three tasks, each a scalar, already weighted; their sum is the loss."""

    classes: Tensor
    boxes: Tensor
    landmarks: Tensor

    @property
    def total(self) -> Tensor:
        """The sum."""
        return self.classes + self.boxes + self.landmarks


def assign_targets(
    boxes: Tensor,
    landmarks: Tensor,
    has_landmarks: Tensor,
    labels: Tensor,
    anchors: Tensor,
    iou_threshold: float = 0.35,
) -> Targets:
    """Gives each anchor the face that it overlaps most, and each face at least its best anchor.

    An anchor is a face where the IoU is at least ``iou_threshold``, or where it is the best anchor of a face. Faces
    with label -1 take anchors in the same way, except from those that are the best of a real face, and these are left
    out of the loss.

    Args:
        boxes: ``(B, M, 4)`` float32 xyxy, relative to the picture.
        landmarks: ``(B, M, 5, 2)`` float32, relative to the picture.
        has_landmarks: ``(B, M)`` bool.
        labels: ``(B, M)`` int64: 1 face, -1 ignored face, 0 padding.
        anchors: ``(A, 4)`` cxcywh, relative to the picture.
        iou_threshold: Overlap from which an anchor is positive.

    Returns:
        The targets, on the device of the anchors.
    """
    batch, faces = labels.shape
    corners = to_xyxy(anchors)
    faces_only = boxes.masked_fill(labels[..., None] == 0, -1.0)  # padding overlaps nothing
    best_iou = anchors.new_full((batch, len(anchors)), -1.0)
    best_face = labels.new_zeros((batch, len(anchors)))
    best_anchor = []
    at_a_time = _FACES_AT_A_TIME.get(anchors.device.type, 16)
    for start in range(0, faces, at_a_time):
        chunk = slice(start, start + at_a_time)
        iou = pairwise_iou(faces_only[:, chunk], corners)
        best_anchor.append(iou.argmax(dim=2))
        value, face = iou.max(dim=1)
        better = value > best_iou
        best_iou = torch.where(better, value, best_iou)
        best_face = torch.where(better, face + start, best_face)

    # Where faces share their best anchor, a real one comes before an ignored one; for the rest any fixed rule will do.
    number = torch.arange(1, faces + 1, device=labels.device).expand(batch, faces)
    claims = torch.where(labels == 1, number + faces, torch.where(labels == -1, number, 0))
    claimed = torch.zeros_like(best_face).scatter_reduce_(1, torch.cat(best_anchor, dim=1), claims, "amax")
    best_face = torch.where(claimed > 0, torch.where(claimed > faces, claimed - faces, claimed) - 1, best_face)

    matched = (best_iou >= iou_threshold) | (claimed > 0)
    rows = (best_face + torch.arange(0, batch * faces, faces, device=labels.device)[:, None]).flatten()

    def of_anchors(values: Tensor) -> Tensor:
        """What each anchor's face has, of ``(B, M, ...)``; whole rows, which a CPU copies faster than ``gather``."""
        of_rows: Tensor = values.flatten(0, 1).index_select(0, rows).unflatten(0, best_face.shape)
        return of_rows

    anchor_labels = torch.where(matched, of_anchors(labels), 0)
    return Targets(
        labels=anchor_labels,
        box_deltas=encode_boxes(of_anchors(boxes), anchors),
        landmark_deltas=encode_landmarks(of_anchors(landmarks), anchors),
        has_landmarks=(anchor_labels == 1) & of_anchors(has_landmarks),
    )


def own_divisor(counts: Tensor) -> Tensor:
    """The counts, of any shape and type, at least 1 each."""
    return counts.clamp(min=1)


def shared_divisor(counts: Tensor) -> Tensor:
    """The mean of the counts over all processes of a training, which must all call this.

    Gradients are averaged over the processes. With sums divided by this, the average is the gradient of a single
    process that has the pictures of all; with each process's own counts, a face among few would weigh more than one
    among many.

    Args:
        counts: Any shape and type.

    Returns:
        The counts of all processes together, at least 1 each, divided by the number of processes; without other
        processes as :func:`own_divisor`. No gradient passes, and no NaN from one process to the others.
    """
    together = _sum_over_processes(counts)
    return own_divisor(counts) if together is None else own_divisor(together) / distributed.get_world_size()


def own_mean(values: Tensor) -> Tensor:
    """The values as they are, of any shape and type."""
    return values


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of statistics over all processes of a training, which must all call this.

    Gradients pass as if the mean were the process's own value. Averaged over the processes, they are those of one
    process that has the pictures of all, wherever each computes the same from the means.

    Args:
        values: Any shape, the same everywhere, floating point.

    Returns:
        The same shape; without other processes the values as they are. No NaN comes from one process to the others.
    """
    together = _sum_over_processes(values)
    return values if together is None else values + (together / distributed.get_world_size() - values).detach()


def _sum_over_processes(values: Tensor) -> Tensor | None:
    """The sum without what is not a number in one of them; None without other processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    together = values.detach().nan_to_num(0)
    distributed.all_reduce(together)
    return together


def detection_loss(
    outputs: Outputs,
    targets: Targets,
    negatives_per_positive: int = 7,
    box_weight: float = 2.0,
    landmark_weight: float = 1.0,
    divisor: Divisor = own_divisor,
) -> Losses:
    """Multi-task loss of RetinaFace (arXiv:1905.00641) with the hard-negative mining of SSD (arXiv:1512.02325).

    Cross-entropy over the faces and the hardest background anchors, smooth-L1 over the boxes of faces and over the
    landmarks of faces that have them. A picture without faces gives as many negatives as one with a single positive
    anchor; a batch without faces gives a finite loss.

    Args:
        outputs: ``class_logits (B, A, 2)``, ``box_deltas (B, A, 4)``, ``landmark_deltas (B, A, 10)``.
        targets: From :func:`assign_targets`.
        negatives_per_positive: Hard negatives mined per positive anchor of a picture.
        box_weight: Weight of the boxes.
        landmark_weight: Weight of the landmarks.
        divisor: What to divide by, from the numbers of anchors that are faces and of those that have landmarks.

    Returns:
        The three weighted losses.
    """
    class_logits, box_deltas, landmark_deltas = (output.float() for output in outputs)
    positive = targets.labels == 1
    positives = positive.sum(dim=1)
    faces, with_landmarks = divisor(torch.stack([positives.sum(), targets.has_landmarks.sum()])).unbind()

    # Of two classes: as one operation it has no deterministic form on GPUs (``torch.use_deterministic_algorithms``).
    margin = face_logit(class_logits)
    cross_entropy = F.softplus(torch.where(positive, -margin, margin))
    wanted = negatives_per_positive * positives.clamp(min=1)
    most = _most_wanted(wanted, positive.shape[1])
    hardest = cross_entropy.masked_fill(targets.labels != 0, 0.0).topk(most, dim=1).values
    mined = torch.arange(most, device=hardest.device) < wanted[:, None]
    classes = ((cross_entropy * positive).sum() + (hardest * mined).sum()) / faces

    # Products, of which a CPU computes gradients in half the time of ``where``.
    box_errors = F.smooth_l1_loss(box_deltas, targets.box_deltas, reduction="none")
    boxes = (box_errors * positive[..., None]).sum() / faces

    landmark_errors = F.smooth_l1_loss(landmark_deltas, targets.landmark_deltas, reduction="none")
    landmarks = (landmark_errors * targets.has_landmarks[..., None]).sum() / with_landmarks
    return Losses(classes, box_weight * boxes, landmark_weight * landmarks)


def _most_wanted(wanted: Tensor, anchors: int) -> int:
    """The largest count: a CPU finds that many in an eighth of the time of sorting all. A GPU is not waited for."""
    return min(int(wanted.max()), anchors) if wanted.device.type == "cpu" else anchors
