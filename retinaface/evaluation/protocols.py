"""At which sizes a detector sees a photo when it is evaluated.

The protocol moves the average precision by tens of points, so figures of different protocols must not be compared.
All keep the photo's aspect ratio, resize bilinearly (as the sources do), and keep faces with a score from 0.02, at most
5000 before and 750 after the suppression at an IoU of 0.4, as the public PyTorch evaluation does:

- ``original``: the photo as it is; the usual one for RetinaFace (biubug6/Pytorch_Retinaface, ``test_widerface.py``
  with its default ``--origin_size``).
- ``vga``: enlarged or shrunk to fit in 640 × 480 pixels, upright photos in 480 × 640. SCRFD's tables
  (deepinsight/insightface, ``detection/scrfd``) say 640 × 480; its test script fits photos in 640 × 640, which is
  ``long640``. The two differ for photos that are squarer than 4:3.
- ``long640``: enlarged or shrunk to a long side of 640 pixels, as in SCRFD's ``tools/test_widerface.py --mode 0`` and
  deepcam-cn/yolov5-face's ``test_widerface.py --img-size 640``. They pad (to a square, or to a multiple of the
  stride); nothing is padded here, as the network takes any size.
- ``multiscale``: with a first scale that makes the short side 800 pixels, but the long side at most 1200, the photo at
  500, 800, 1100, 1400 and 1700 800ths of that, each also mirrored; the scales of ``detection/retinaface``'s
  ``test_widerface.py``. Each of the ten views is suppressed by itself, then their boxes vote (:func:`vote`).
"""

from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import box_iou  # type: ignore[import-untyped]

from retinaface.data.annotations import MIRRORED_LANDMARKS
from retinaface.delivery.runtime import Detector
from retinaface.model.postprocess import Detections, suppress

Protocol = Literal["original", "vga", "long640", "multiscale"]

# What the public evaluation uses: nearly everything is kept, the score ranks it.
SCORE_THRESHOLD = 0.02
NMS_THRESHOLD = 0.4
KEEP = 750


class View(NamedTuple):
    """One look at a photo.

    Attributes:
        height: of the resized photo, in pixels.
        width: of the resized photo, in pixels.
        mirrored: whether left and right change sides.
    """

    height: int
    width: int
    mirrored: bool = False


def views_of(height: int, width: int, protocol: Protocol) -> list[View]:
    """List the views of a photo.

    Args:
        height: of the photo, in pixels.
        width: of the photo, in pixels.
        protocol: see the module.

    Returns:
        At least one view.
    """
    short, long = min(height, width), max(height, width)
    match protocol:
        case "original":
            return [View(height, width)]
        case "vga":
            return [_scaled(height, width, min(640 / long, 480 / short))]
        case "long640":
            return [_scaled(height, width, 640 / long)]
        case "multiscale":
            first = min(800 / short, 1200 / long)
            plain = [_scaled(height, width, first * side / 800) for side in (500, 800, 1100, 1400, 1700)]
            return [view._replace(mirrored=mirrored) for view in plain for mirrored in (False, True)]


def _scaled(height: int, width: int, scale: float) -> View:
    return View(max(1, round(height * scale)), max(1, round(width * scale)))


def detect_in_views(detector: Detector, image: NDArray[np.uint8], protocol: Protocol) -> Detections:
    """Find faces as a protocol demands.

    Args:
        detector: what finds them.
        image: ``(H, W, 3)`` uint8 BGR.
        protocol: see the module.

    Returns:
        The faces, best first, in pixels of the photo.
    """
    found = [_detect(detector, image, view) for view in views_of(image.shape[0], image.shape[1], protocol)]
    return found[0] if len(found) == 1 else vote(found)


def _detect(detector: Detector, image: NDArray[np.uint8], view: View) -> Detections:
    height, width = image.shape[:2]
    picture = image
    if (view.height, view.width) != (height, width):
        picture = np.asarray(cv2.resize(image, (view.width, view.height), interpolation=cv2.INTER_LINEAR), np.uint8)
    if view.mirrored:
        picture = picture[:, ::-1]
    faces = detector.detect(picture, SCORE_THRESHOLD, NMS_THRESHOLD, keep=KEEP)
    boxes, landmarks = faces.boxes, faces.landmarks
    if view.mirrored:
        boxes = torch.stack([view.width - boxes[:, 2], boxes[:, 1], view.width - boxes[:, 0], boxes[:, 3]], dim=1)
        landmarks = torch.stack([view.width - landmarks[..., 0], landmarks[..., 1]], dim=-1)[:, MIRRORED_LANDMARKS]
    scale = torch.tensor([view.width / width, view.height / height])
    return Detections(boxes / scale.repeat(2), faces.scores, landmarks / scale)


def vote(found: list[Detections]) -> Detections:
    """Merge what several views of a photo show.

    Of boxes that overlap, the best-scored one leads, and those that overlap it more than the suppression allows give
    it their vote: box and landmarks become the mean of all, weighted by score, and the score stays the leader's (box
    voting; Gidaris and Komodakis, arXiv:1505.01749). insightface's script also throws away boxes that a single view
    found; here they stay.

    Args:
        found: per view, in pixels of the photo.

    Returns:
        At most 750 faces, best first.
    """
    boxes, scores, landmarks = (torch.cat(values) for values in zip(*found, strict=True))
    scores, order = scores.sort(descending=True, stable=True)
    boxes, landmarks = boxes[order], landmarks[order]
    leaders = suppress(boxes, scores, NMS_THRESHOLD, KEEP)
    if not len(leaders):
        return Detections(boxes, scores, landmarks)
    overlaps = box_iou(boxes, boxes[leaders]) > NMS_THRESHOLD
    overlaps[leaders, torch.arange(len(leaders))] = True  # a box without area overlaps nothing, not even itself
    voters = overlaps.any(dim=1).nonzero()[:, 0]
    leader = overlaps[voters].int().argmax(dim=1)  # the first, and so the best-scored
    weights = scores[voters]
    total = torch.zeros(len(leaders)).index_add_(0, leader, weights)
    values = torch.cat([boxes, landmarks.flatten(1)], dim=1)[voters] * weights[:, None]
    mean = torch.zeros(len(leaders), 14).index_add_(0, leader, values) / total[:, None]
    return Detections(mean[:, :4], scores[leaders], mean[:, 4:].unflatten(1, (5, 2)))
