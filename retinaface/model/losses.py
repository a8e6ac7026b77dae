"""What the detector is trained on: target assignment and the multi-task loss.

Everything runs for the whole batch at once on its device, without loops over pictures and without waiting for it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retinaface.model.boxes import encode_boxes, encode_landmarks, pairwise_iou, to_xyxy
from retinaface.model.network import Outputs

# Faces compared with all anchors at a time: bounds memory on crowds (8 pictures x 64 faces x 16,800 anchors = 34 MB).
_FACES_AT_A_TIME = 64


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
    best_iou = anchors.new_full((batch, len(anchors)), -1.0)
    best_face = labels.new_zeros((batch, len(anchors)))
    best_anchor = []
    for start in range(0, faces, _FACES_AT_A_TIME):
        chunk = slice(start, start + _FACES_AT_A_TIME)
        iou = pairwise_iou(boxes[:, chunk], corners)
        iou.masked_fill_(labels[:, chunk, None] == 0, -1.0)
        best_anchor.append(iou.argmax(dim=2))
        value, face = iou.max(dim=1)
        better = value > best_iou
        best_iou = torch.where(better, value, best_iou)
        best_face = torch.where(better, face + start, best_face)

    # Where faces share their best anchor, a real one comes before an ignored one; for the rest any fixed rule will do.
    number = torch.arange(1, faces + 1, device=labels.device).expand(batch, faces)
    claims = torch.where(labels == 1, number + faces, torch.where(labels == -1, number, 0))
    claimed = torch.zeros_like(best_face).scatter_reduce_(1, torch.cat(best_anchor, dim=1), claims, "amax")
    best_face = torch.where(claimed > 0, (claimed - 1) % faces, best_face)

    matched = (best_iou >= iou_threshold) | (claimed > 0)
    anchor_labels = torch.where(matched, labels.gather(1, best_face), 0)
    matched_boxes = boxes.gather(1, best_face[..., None].expand(-1, -1, 4))
    points = landmarks.flatten(2).gather(1, best_face[..., None].expand(-1, -1, 10)).unflatten(2, (5, 2))
    return Targets(
        labels=anchor_labels,
        box_deltas=encode_boxes(matched_boxes, anchors),
        landmark_deltas=encode_landmarks(points, anchors),
        has_landmarks=(anchor_labels == 1) & has_landmarks.gather(1, best_face),
    )


def detection_loss(
    outputs: Outputs,
    targets: Targets,
    negatives_per_positive: int = 7,
    box_weight: float = 2.0,
    landmark_weight: float = 1.0,
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

    Returns:
        The three weighted losses.
    """
    class_logits, box_deltas, landmark_deltas = (output.float() for output in outputs)
    positive = targets.labels == 1
    positives = positive.sum(dim=1)
    total = positives.sum().clamp(min=1)

    cross_entropy = F.cross_entropy(class_logits.transpose(1, 2), positive.long(), reduction="none")
    hardest = cross_entropy.masked_fill(targets.labels != 0, 0.0).sort(dim=1, descending=True).values
    rank = torch.arange(hardest.shape[1], device=hardest.device)
    mined = rank < negatives_per_positive * positives.clamp(min=1)[:, None]
    classes = ((cross_entropy * positive).sum() + (hardest * mined).sum()) / total

    box_error = F.smooth_l1_loss(box_deltas, targets.box_deltas, reduction="none").sum(dim=2)
    boxes = torch.where(positive, box_error, 0.0).sum() / total

    landmark_error = F.smooth_l1_loss(landmark_deltas, targets.landmark_deltas, reduction="none").sum(dim=2)
    landmarks = torch.where(targets.has_landmarks, landmark_error, 0.0).sum()
    landmarks = landmarks / targets.has_landmarks.sum().clamp(min=1)
    return Losses(classes, box_weight * boxes, landmark_weight * landmarks)
