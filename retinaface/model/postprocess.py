"""From raw outputs to detections; the same code for torch, ONNX and any other runtime's outputs."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms  # type: ignore[import-untyped]

from retinaface.model.anchors import make_anchors, picture_size
from retinaface.model.boxes import decode_boxes, decode_landmarks
from retinaface.model.network import NetworkConfig, Outputs, face_logit

_PIECE = 750


class Detections(NamedTuple):
    """The faces found in one picture, best first.

    Attributes:
        boxes: ``(N, 4)`` float32 xyxy in pixels.
        scores: ``(N,)`` float32 in 0-1.
        landmarks: ``(N, 5, 2)`` float32 in pixels: left eye, right eye, nose, left and right mouth corner, as seen.
    """

    boxes: Tensor
    scores: Tensor
    landmarks: Tensor


def postprocess(
    outputs: Outputs,
    image_size: tuple[int, int],
    config: NetworkConfig,
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
    top_k: int = 5000,
    keep: int = 750,
) -> list[Detections]:
    """Decodes, filters by score, and suppresses overlapping boxes.

    Args:
        outputs: ``class_logits (B, A, 2)``, ``box_deltas (B, A, 4)``, ``landmark_deltas (B, A, 10)``.
        image_size: Height and width of the network's input in pixels.
        config: The network's anchors and strides.
        score_threshold: Faces with a lower score are dropped.
        nms_threshold: Of two boxes with a higher IoU the lower-scored one is dropped.
        top_k: Candidates per picture that enter the suppression.
        keep: Faces per picture that are returned.

    Returns:
        One :class:`Detections` per picture, on the device of the outputs.
    """
    class_logits, box_deltas, landmark_deltas = outputs
    height, width = image_size
    device = class_logits.device
    anchors = make_anchors(height, width, config.anchor_sizes, config.strides, device)
    scale = picture_size(height, width, device)
    scores = face_logit(class_logits.float()).sigmoid()
    found = []
    for picture, picture_scores in enumerate(scores):
        # Filter before decoding: of tens of thousands of anchors a few hundred are left, and of these fewer faces.
        best, candidates = (each[:top_k] for each in best_anchors(picture_scores, score_threshold))
        boxes = decode_boxes(box_deltas[picture, candidates].float(), anchors[candidates]) * scale.repeat(2)
        kept = suppress(boxes, best, nms_threshold, keep)
        faces = candidates[kept]
        landmarks = decode_landmarks(landmark_deltas[picture, faces].float(), anchors[faces]) * scale
        found.append(Detections(boxes[kept], best[kept], landmarks))
    return found


def best_anchors(scores: Tensor, score_threshold: float) -> tuple[Tensor, Tensor]:
    """Scores at or above a threshold, best first.

    INT8 knows few scores: of equal ones the first is the best, as in ONNX's own suppression.

    Args:
        scores: ``(A,)`` float32 of one picture.
        score_threshold: Lower scores are dropped.

    Returns:
        ``(N,)`` float32 falling scores, and ``(N,)`` int64 anchors that have them.
    """
    candidates = (scores >= score_threshold).nonzero()[:, 0]
    best, order = scores[candidates].sort(descending=True, stable=True)
    return best, candidates[order]


def suppress(boxes: Tensor, scores: Tensor, nms_threshold: float, keep: int) -> Tensor:
    """Drops the boxes that overlap a better one too much (non-maximum suppression), until enough are kept.

    Args:
        boxes: ``(N, 4)`` float32 xyxy, best first.
        scores: ``(N,)`` float32, falling.
        nms_threshold: Of two boxes with a higher IoU the later one is dropped.
        keep: Boxes that are returned at most.

    Returns:
        ``(K,)`` int64 indices of the kept boxes, best first: the first ``keep`` of ``torchvision.ops.nms``.
    """
    # The time grows with kept boxes times candidates, and what is kept does not depend on what is worse. So take the
    # candidates in pieces and stop when there are enough: for 750 of 3000 to 4000 this halves the time on the CPU.
    kept = torch.empty(0, dtype=torch.int64, device=boxes.device)
    for piece in torch.arange(len(boxes), device=boxes.device).split(_PIECE):
        rivals = torch.cat([kept, piece])
        kept = rivals[nms(boxes[rivals], scores[rivals], nms_threshold)]
        if len(kept) >= keep:
            break
    return kept[:keep]
