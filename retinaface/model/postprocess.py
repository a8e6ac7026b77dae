"""From raw outputs to detections; the same code for torch, ONNX and any other runtime's outputs."""

from typing import NamedTuple

from torch import Tensor
from torchvision.ops import batched_nms  # type: ignore[import-untyped]

from retinaface.model.anchors import make_anchors, picture_size
from retinaface.model.boxes import decode_boxes, decode_landmarks
from retinaface.model.network import NetworkConfig, Outputs


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
    scores = class_logits.float().softmax(dim=-1)[..., 1]

    # Filter before decoding: of tens of thousands of anchors a few hundred are left.
    candidates = min(top_k, scores.shape[1])
    best, anchor_index = scores.topk(candidates, dim=1)
    picture, rank = (best >= score_threshold).nonzero(as_tuple=True)
    anchor_index = anchor_index[picture, rank]
    scores = best[picture, rank]
    chosen = anchors[anchor_index]
    scale = picture_size(height, width, device)
    boxes = decode_boxes(box_deltas[picture, anchor_index].float(), chosen) * scale.repeat(2)
    landmarks = decode_landmarks(landmark_deltas[picture, anchor_index].float(), chosen) * scale

    kept = batched_nms(boxes, scores, picture, nms_threshold)  # best first over the whole batch
    return [
        Detections(boxes[index], scores[index], landmarks[index])
        for index in (kept[picture[kept] == b][:keep] for b in range(class_logits.shape[0]))
    ]
