"""Average precision with the WIDER FACE protocol, to the digit.

The protocol differs from VOC and COCO in ways that move the result by whole points, so nothing here is approximate:

- the scores of *all* evaluated photos are normalised together to 0–1;
- precision and recall are taken at 1000 thresholds (0.999, 0.998, … 0), from counts summed over the photos;
- overlap is intersection over union of boxes that include their last pixel (``x2 - x1 + 1``), and .5 is enough;
- a detection belongs to the face that it overlaps most, whether that face counts or not. Where it does not count in
  the subset at hand (``easy`` leaves out small faces, for example) the detection is neither right nor wrong;
- a counted face is found once, by its best-scored detection; every further detection of it is a false alarm;
- the detections of a photo without any face are not held against the detector (only their scores enter the
  normalisation).

Boxes are xyxy in pixels throughout. The functions take one array per photo:

- ``detections``: ``(N, 5)`` float, ``x1, y1, x2, y2, score``, in any order;
- ``faces``: ``(M, 4)``, every annotated face;
- ``counted``: ``(M,)`` bool, which of them count.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchmetrics
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from retinaface.data.annotations import read_difficulty
from retinaface.errors import InputError

THRESHOLDS: NDArray[np.float64] = 1 - (np.arange(1000) + 1) / 1000
SUBSETS = ("all", "easy", "medium", "hard")

_log = logging.getLogger(__name__)


class Curve(NamedTuple):
    """Precision against recall, one point per threshold, from the strictest to the most lenient.

    Attributes:
        recall: ``(1000,)`` float64, found faces over counted faces; NaN where no face counts.
        precision: ``(1000,)`` float64, found faces over detections that were judged; 1 where none were.
    """

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]


@dataclass(frozen=True)
class _Matches:
    """The detections of all photos in one row, each photo's in order of descending score.

    Attributes:
        scores: ``(T,)`` float64, normalised to 0–1.
        faces: ``(T,)`` int64, the face (numbered through all photos) that the detection belongs to, or -1.
    """

    scores: NDArray[np.float64]
    faces: NDArray[np.int64]


def precision_recall(
    detections: Sequence[ArrayLike],
    faces: Sequence[ArrayLike],
    counted: Sequence[ArrayLike],
    iou_threshold: float = 0.5,
) -> Curve:
    """Compute the precision-recall curve of one subset of the faces.

    Args:
        detections: per photo ``(N, 5)``, xyxy and score.
        faces: per photo ``(M, 4)``, every annotated face.
        counted: per photo ``(M,)`` bool, which faces count.
        iou_threshold: the smallest overlap at which a detection belongs to a face.

    Returns:
        The curve. Detections that all have the same score (which the reference evaluator divides by zero for) are
        taken as certain: one operating point, present at every threshold.

    Raises:
        ValueError: the three lists differ in length, shapes do not fit, or a score is not finite.
    """
    return subset_curves(detections, faces, [{"": mask} for mask in counted], iou_threshold)[""]


def average_precision(
    detections: Sequence[ArrayLike],
    faces: Sequence[ArrayLike],
    counted: Sequence[ArrayLike],
    iou_threshold: float = 0.5,
) -> float:
    """Compute the average precision of one subset of the faces.

    Args:
        detections: per photo ``(N, 5)``, xyxy and score.
        faces: per photo ``(M, 4)``, every annotated face.
        counted: per photo ``(M,)`` bool, which faces count.
        iou_threshold: the smallest overlap at which a detection belongs to a face.

    Returns:
        The area under the precision-recall curve, 0–1: 0 without detections, NaN where no face counts.

    Raises:
        ValueError: the three lists differ in length, shapes do not fit, or a score is not finite.
    """
    return area_under(precision_recall(detections, faces, counted, iou_threshold))


def subset_curves(
    detections: Sequence[ArrayLike],
    faces: Sequence[ArrayLike],
    counted: Sequence[Mapping[str, ArrayLike]],
    iou_threshold: float = 0.5,
) -> dict[str, Curve]:
    """Compute the precision-recall curves of several subsets while matching the detections once.

    Args:
        detections: per photo ``(N, 5)``, xyxy and score.
        faces: per photo ``(M, 4)``, every annotated face.
        counted: per photo, subset name to ``(M,)`` bool; a photo that lacks a subset takes no part in it.
        iou_threshold: the smallest overlap at which a detection belongs to a face.

    Returns:
        Subset name to curve, in the order in which the names appear.

    Raises:
        ValueError: the three lists differ in length, shapes do not fit, or a score is not finite.
    """
    if not len(detections) == len(faces) == len(counted):
        raise ValueError(f"photos differ: {len(detections)} detections, {len(faces)} faces, {len(counted)} counted")
    photo_detections = [_sorted_rows(rows) for rows in detections]
    photo_faces = [_rows(boxes, 4, "faces") for boxes in faces]
    normalise = _score_normaliser(photo_detections)
    curves = {}
    for subset in dict.fromkeys(name for masks in counted for name in masks):
        photos = [photo for photo, masks in enumerate(counted) if subset in masks]
        masks = [_mask(counted[photo][subset], len(photo_faces[photo])) for photo in photos]
        curves[subset] = photos, masks
    matches: dict[tuple[int, ...], _Matches] = {}
    result = {}
    for subset, (photos, masks) in curves.items():
        key = tuple(photos)
        if key not in matches:
            matches[key] = _match(
                [photo_detections[photo] for photo in photos], [photo_faces[photo] for photo in photos], iou_threshold
            )
        result[subset] = _curve(matches[key], normalise, np.concatenate(masks))
    return result
