"""Boxes and landmarks: formats, overlaps, and coding relative to anchors.

The coding is that of SSD (arXiv:1512.02325): offsets of the centre in units of the anchor's size, logarithms of the
size ratio, both divided by the variances.
"""

import torch
from torch import Tensor

# Variances of centre and size; those of the public weights.
VARIANCES = (0.1, 0.2)

# Boxes are kept from collapsing to nothing before a logarithm or a division, relative to the picture's side.
SMALLEST_SIDE = 1e-6


def to_xyxy(boxes: Tensor) -> Tensor:
    """Turns cxcywh ``(..., 4)`` into xyxy."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def pairwise_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Intersection over union of every box with every anchor.

    Args:
        boxes: ``(B, M, 4)`` xyxy.
        anchors: ``(A, 4)`` xyxy, each with an area.

    Returns:
        ``(B, M, A)``; 0 for a box without area.
    """
    # Each side in one piece of memory: with steps of four numbers a CPU takes twice as long.
    left, top, right, bottom = anchors.T.contiguous()
    width = torch.minimum(boxes[..., 2, None], right).sub_(torch.maximum(boxes[..., 0, None], left)).clamp_(min=0)
    height = torch.minimum(boxes[..., 3, None], bottom).sub_(torch.maximum(boxes[..., 1, None], top)).clamp_(min=0)
    overlap = width.mul_(height)
    union = (_area(boxes)[..., None] + (right - left) * (bottom - top)).sub_(overlap)
    return overlap.div_(union)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Codes boxes relative to their anchors.

    Args:
        boxes: ``(..., A, 4)`` xyxy, relative to the picture.
        anchors: ``(A, 4)`` cxcywh.

    Returns:
        ``(..., A, 4)`` deltas, finite also for boxes without area.
    """
    low, high = boxes.split(2, dim=-1)
    anchor_centre, anchor_size = anchors.split(2, dim=-1)
    return torch.cat(
        [
            ((low + high) / 2 - anchor_centre) / (VARIANCES[0] * anchor_size),
            torch.log((high - low).clamp(min=SMALLEST_SIDE) / anchor_size) / VARIANCES[1],
        ],
        dim=-1,
    )


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of :func:`encode_boxes`: deltas ``(..., A, 4)`` to xyxy relative to the picture."""
    anchor_centre, anchor_size = anchors.split(2, dim=-1)
    centre = anchor_centre + deltas[..., :2] * VARIANCES[0] * anchor_size
    size = anchor_size * torch.exp(deltas[..., 2:] * VARIANCES[1])
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def encode_landmarks(landmarks: Tensor, anchors: Tensor) -> Tensor:
    """Codes landmarks ``(..., A, 5, 2)``, relative to the picture, as ``(..., A, 10)`` deltas to their anchors."""
    # Rows of ten, which a CPU computes faster, and puts together in half the time of ``repeat``.
    centre, size = torch.cat([anchors[:, :2]] * 5, dim=1), torch.cat([anchors[:, 2:]] * 5, dim=1)
    return (landmarks.flatten(-2) - centre) / (VARIANCES[0] * size)


def decode_landmarks(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Inverse of :func:`encode_landmarks`: ``(..., A, 10)`` deltas to ``(..., A, 5, 2)`` relative to the picture."""
    centre, size = anchors[:, None, :2], anchors[:, None, 2:]
    offsets: Tensor = deltas.unflatten(-1, (5, 2))
    return centre + offsets * VARIANCES[0] * size
