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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchmetrics
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from retinaface.data.annotations import DIFFICULTIES, Difficulty, read_difficulty
from retinaface.data.check import SIZE_EDGES
from retinaface.errors import InputError

THRESHOLDS: NDArray[np.float64] = 1 - (np.arange(1000) + 1) / 1000
SUBSETS = ("all", *DIFFICULTIES)

SIZE_CLASSES = (f"<{SIZE_EDGES[0]}", *(f"{low}-{high}" for low, high in pairwise(SIZE_EDGES)), f">={SIZE_EDGES[-1]}")
"""Faces by the shorter side of their box in pixels of the photo, as ``check-data`` counts them."""

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
        photos: ``(T,)`` int64, the photo that the detection was made on.
        faces: ``(T,)`` int64, the face (numbered through all photos) that the detection belongs to, or -1.
        sizes: ``(T,)`` int64, the detection's place in ``SIZE_CLASSES``.
    """

    scores: NDArray[np.float64]
    photos: NDArray[np.int64]
    faces: NDArray[np.int64]
    sizes: NDArray[np.int64]


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
    no_photos = Curve(np.full(len(THRESHOLDS), np.nan), np.ones(len(THRESHOLDS)))
    return subset_curves(detections, faces, [{"": mask} for mask in counted], iou_threshold).get("", no_photos)


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
    face_rows, matches = _match_photos(detections, faces, len(counted), iou_threshold)
    curves = {}
    for subset in dict.fromkeys(name for masks in counted for name in masks):
        takes_part = np.array([subset in masks for masks in counted])
        masks = [
            _mask(photo.get(subset, np.zeros(len(rows), bool)), len(rows))
            for photo, rows in zip(counted, face_rows, strict=True)
        ]
        curves[subset] = _curve(matches, takes_part[matches.photos], np.concatenate(masks))
    return curves


def size_curves(
    detections: Sequence[ArrayLike],
    faces: Sequence[ArrayLike],
    counted: Sequence[ArrayLike],
    iou_threshold: float = 0.5,
) -> dict[str, Curve]:
    """Compute the precision-recall curves of faces of similar size.

    In the curve of a size class the faces of other sizes do not count, as in the protocol; and a detection that
    belongs to no face is a false alarm in the class of its own size only, as in COCO's evaluation by area (in the
    protocol itself it would be one in every class, and rare sizes would drown in those of the frequent).

    Args:
        detections: per photo ``(N, 5)``, xyxy and score.
        faces: per photo ``(M, 4)``, every annotated face.
        counted: per photo ``(M,)`` bool, which faces count.
        iou_threshold: the smallest overlap at which a detection belongs to a face.

    Returns:
        Name in ``SIZE_CLASSES`` to curve, for the classes that hold a counted face, in that order.

    Raises:
        ValueError: the three lists differ in length, shapes do not fit, or a score is not finite.
    """
    face_rows, matches = _match_photos(detections, faces, len(counted), iou_threshold)
    every = np.concatenate([np.empty((0, 4)), *face_rows])
    masks = [_mask(mask, len(rows)) for mask, rows in zip(counted, face_rows, strict=True)]
    mask = np.concatenate([np.empty(0, bool), *masks])
    face_sizes = _size_class(every)
    return {
        name: _curve(matches, (matches.faces >= 0) | (matches.sizes == index), mask & (face_sizes == index))
        for index, name in enumerate(SIZE_CLASSES)
        if (mask & (face_sizes == index)).any()
    }


def _match_photos(
    detections: Sequence[ArrayLike], faces: Sequence[ArrayLike], counted: int, iou_threshold: float
) -> tuple[list[NDArray[np.float64]], _Matches]:
    """Each photo's faces as rows, and what the detections belong to."""
    if not len(detections) == len(faces) == counted:
        raise ValueError(f"photos differ: {len(detections)} detections, {len(faces)} faces, {counted} counted")
    face_rows = [_rows(boxes, 4, "faces") for boxes in faces]
    return face_rows, _match([_by_score(rows) for rows in detections], face_rows, iou_threshold)


def _size_class(boxes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places in ``SIZE_CLASSES`` of ``(N, 4)`` xyxy boxes."""
    classes: NDArray[np.int64] = np.digitize((boxes[:, 2:4] - boxes[:, :2]).min(axis=1), SIZE_EDGES)
    return classes


def area_under(curve: Curve) -> float:
    """Compute the area under a curve: the sum over recall of the best precision at that recall or beyond (VOC).

    Args:
        curve: precision against recall, in order of rising recall.

    Returns:
        The area, 0–1, or NaN where the recall is NaN.
    """
    if np.isnan(curve.recall).any():
        return float("nan")
    recall = np.concatenate(([0.0], curve.recall, [1.0]))
    precision = np.concatenate((curve.precision, [0.0]))
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * best_from_here))


class Judgement(NamedTuple):
    """What the protocol says about the detections and faces of one photo.

    Attributes:
        found: ``(N,)`` bool, detections that find a counted face.
        false_alarms: ``(N,)`` bool, detections of nothing, or of a face that a better-scored one has found.
        missed: ``(M,)`` bool, counted faces that no detection finds.
        owners: ``(N,)`` int64, the face that a detection belongs to, or -1.
    """

    found: NDArray[np.bool_]
    false_alarms: NDArray[np.bool_]
    missed: NDArray[np.bool_]
    owners: NDArray[np.int64]


def judge_photo(detections: ArrayLike, faces: ArrayLike, counted: ArrayLike, iou_threshold: float = 0.5) -> Judgement:
    """Judge the detections of one photo, to show rather than to count.

    Args:
        detections: ``(N, 5)``, xyxy and score, in any order.
        faces: ``(M, 4)``, every annotated face.
        counted: ``(M,)`` bool, which faces count.
        iou_threshold: the smallest overlap at which a detection belongs to a face.

    Returns:
        The judgement, in the order of the arguments. Detections that are neither found nor false alarms lie on faces
        that do not count. (Without any face the average precision overlooks false alarms; they are told here.)

    Raises:
        ValueError: a shape does not fit.
    """
    rows, boxes = _rows(detections, 5, "detections"), _rows(faces, 4, "faces")
    mask = _mask(counted, len(boxes))
    order = np.argsort(-rows[:, 4], kind="stable")
    owners = _owners(rows, boxes, iou_threshold) if len(boxes) else np.full(len(rows), -1)
    found, judged = np.empty(len(rows), bool), np.empty(len(rows), bool)
    judged[order], found[order] = _judge(owners[order], mask)
    missed = mask.copy()
    missed[owners[found]] = False
    return Judgement(found, judged & ~found, missed, owners)


def _match(
    detections: Sequence[NDArray[np.float64]], faces: Sequence[NDArray[np.float64]], iou_threshold: float
) -> _Matches:
    """Assign every detection (sorted by score within its photo) to the face that it overlaps most."""
    scores = _normalised([rows[:, 4] for rows in detections])
    first_face = np.cumsum([0, *(len(rows) for rows in faces)])
    photos, owners, kept_scores, sizes = [], [], [], []
    for photo, (rows, boxes) in enumerate(zip(detections, faces, strict=True)):
        if len(rows) == 0 or len(boxes) == 0:
            continue
        best = _owners(rows, boxes, iou_threshold)
        owners.append(np.where(best >= 0, best + first_face[photo], -1))
        photos.append(np.full(len(rows), photo))
        kept_scores.append(scores[photo])
        sizes.append(_size_class(rows))
    return _Matches(
        np.concatenate([np.empty(0), *kept_scores]),
        np.concatenate([np.empty(0, np.int64), *photos]),
        np.concatenate([np.empty(0, np.int64), *owners]),
        np.concatenate([np.empty(0, np.int64), *sizes]),
    )


def _owners(detections: NDArray[np.float64], faces: NDArray[np.float64], iou_threshold: float) -> NDArray[np.int64]:
    """Find the face that each detection overlaps most, or -1 where that is not enough."""
    overlaps = _overlaps(detections, faces)
    best = overlaps.argmax(axis=1)
    return np.where(overlaps[np.arange(len(best)), best] >= iou_threshold, best, -1)


def _curve(matches: _Matches, takes_part: NDArray[np.bool_], counted: NDArray[np.bool_]) -> Curve:
    """Count found faces and judged detections (of those that take part) at every threshold.

    The reference evaluator walks through thresholds, photos and detections. Only sums over photos are used in the
    end, so it is enough to know of each detection whether it is judged and whether it finds a face, and to count the
    scores that reach each threshold.
    """
    judged, found = _judge(matches.faces, counted)
    judged &= takes_part
    found &= judged
    n_judged = _reaching_thresholds(matches.scores[judged])
    n_found = _reaching_thresholds(matches.scores[found])
    n_counted = int(counted.sum())
    recall = n_found / n_counted if n_counted else np.full(len(THRESHOLDS), np.nan)
    precision = np.divide(n_found, n_judged, out=np.ones(len(THRESHOLDS)), where=n_judged > 0)
    return Curve(recall, precision)


def _judge(owners: NDArray[np.int64], counted: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which detections (``owners``: their faces or -1, best score first) are judged, and which find a face."""
    on_face = owners >= 0
    on_counted = on_face & (counted[owners] if len(counted) else False)
    candidates = np.flatnonzero(on_counted)
    _, first = np.unique(owners[candidates], return_index=True)
    found = np.zeros(len(owners), bool)
    found[candidates[first]] = True
    return on_counted | ~on_face, found


def _reaching_thresholds(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the scores at or above each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), THRESHOLDS, side="left")


def _normalised(scores: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Stretch the scores of all photos together to 0–1."""
    every = np.concatenate([np.empty(0), *scores])
    if not np.isfinite(every).all():
        raise ValueError("detections: scores must be finite")
    low, high = (every.min(), every.max()) if len(every) else (0.0, 0.0)
    if low == high:
        return [np.ones_like(values) for values in scores]
    return [(values - low) / (high - low) for values in scores]


def _overlaps(detections: NDArray[np.float64], faces: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the ``(N, M)`` intersection over union of boxes that include their last pixel."""
    low = np.maximum(detections[:, None, :2], faces[None, :, :2])
    high = np.minimum(detections[:, None, 2:4], faces[None, :, 2:4])
    intersection = (high - low + 1).clip(min=0).prod(axis=2)
    union = _areas(detections)[:, None] + _areas(faces)[None, :] - intersection
    overlaps: NDArray[np.float64] = intersection / union
    return overlaps


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def _rows(values: ArrayLike, columns: int, what: str) -> NDArray[np.float64]:
    rows = np.asarray(values, np.float64)
    if rows.size == 0:
        return rows.reshape(0, columns)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"{what}: expected shape (N, {columns}), got {rows.shape}")
    return rows


def _by_score(values: ArrayLike) -> NDArray[np.float64]:
    """Put detections in order of descending score; equal scores keep their order."""
    rows = _rows(values, 5, "detections")
    return rows[np.argsort(-rows[:, 4], kind="stable")]


def _mask(values: ArrayLike, length: int) -> NDArray[np.bool_]:
    mask = np.asarray(values, bool)
    if mask.shape != (length,):
        raise ValueError(f"counted: expected shape ({length},), got {mask.shape}")
    return mask


def read_predictions(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Read detections in the WIDER FACE result format.

    Args:
        folder: holds ``<event>/<image>.txt``: a line with the image's name, a line with the number of detections, and
            one line ``x y width height score`` for each.

    Returns:
        ``<event>/<image>`` to ``(N, 5)`` float64 xyxy and score, in order of descending score, whatever the order in
        the file.

    Raises:
        InputError: the folder is missing or holds no such file, or a line is malformed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds <event>/<image>.txt result files")
    files = sorted(folder.glob("*/*.txt"))
    if not files:
        raise InputError(f"{folder}: holds no result file; expected <event>/<image>.txt in the WIDER FACE format")
    return {f"{file.parent.name}/{file.stem}": _read_prediction(file) for file in files}


def _read_prediction(file: Path) -> NDArray[np.float64]:
    try:
        lines = file.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text ({error}); expected a WIDER FACE result file") from None
    if len(lines) < 2 or not lines[1].strip().isdigit():
        raise InputError(f"{file}:2: expected the number of detections, below a line with the image's name")
    count = int(lines[1])
    if len(lines) - 2 != count:
        raise InputError(f"{file}:2: announces {count} detections, but {len(lines) - 2} lines follow; write it anew")
    if count == 0:
        return np.empty((0, 5))
    try:
        rows = np.loadtxt(lines[2:], ndmin=2, comments=None)
    except ValueError:
        rows = np.empty((0, 0))
    if rows.shape != (count, 5) or not np.isfinite(rows).all():
        raise InputError(f"{file}:{_first_bad_line(lines)}: expected five finite numbers: x y width height score")
    rows[:, 2:4] += rows[:, :2]
    return _by_score(rows)


def _first_bad_line(lines: Sequence[str]) -> int:
    """Find the line (from 1) that is not five finite numbers, once it is known that there is one."""
    for number, line in enumerate(lines[2:], start=3):
        try:
            values = np.array(line.split(), np.float64)
        except ValueError:
            return number
        if len(values) != 5 or not np.isfinite(values).all():
            return number
    return len(lines)


def write_predictions(folder: Path, name: str, boxes: ArrayLike, scores: ArrayLike) -> Path:
    """Write one photo's detections in the WIDER FACE result format.

    Args:
        folder: the results' folder; made where it is missing.
        name: ``<event>/<image>`` without a suffix.
        boxes: ``(N, 4)`` xyxy in photo pixels.
        scores: ``(N,)``.

    Returns:
        The file written, ``<folder>/<event>/<image>.txt``, its lines in order of descending score as the official
        tools expect, with enough digits to give every float32 back.
    """
    corners = _rows(boxes, 4, "boxes")
    rows = _by_score(np.column_stack((corners[:, :2], corners[:, 2:] - corners[:, :2], np.asarray(scores))))
    file = folder / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        out.write(f"{file.stem}\n{len(rows)}\n")
        np.savetxt(out, rows, fmt="%.9g")
    return file


def evaluate_predictions(
    predictions: Path, ground_truth: Path, iou_threshold: float = 0.5, skip_missing: bool = False
) -> dict[str, float]:
    """Evaluate a folder of result files against the official WIDER FACE ground truth.

    Events without any result file are left out, so that a part of the photos can be evaluated; a warning is logged
    that says how many. Result files of photos that the ground truth does not know only enter the normalisation of
    the scores, as in the reference evaluator.

    Args:
        predictions: holds ``<event>/<image>.txt`` in the WIDER FACE result format.
        ground_truth: holds ``wider_face_val.mat`` and ``wider_{easy,medium,hard}_val.mat``.
        iou_threshold: the smallest overlap at which a detection belongs to a face.
        skip_missing: leave out the photos of an evaluated event that have no result file, with a warning.

    Returns:
        ``easy``, ``medium`` and ``hard`` to average precision, 0–1.

    Raises:
        InputError: a folder or file is missing or malformed; or, without ``skip_missing``, photos of an evaluated
            event have no result file.
    """
    detections = read_predictions(predictions)
    truth = read_difficulty(ground_truth)
    known_events = {_event(name) for name in truth}
    events = known_events & {_event(name) for name in detections}
    if not events:
        raise InputError(f"{predictions}: none of its folders is a WIDER FACE event, such as {min(known_events)}")
    missing = sorted(name for name in truth if _event(name) in events and name not in detections)
    if missing:
        lack = (
            f"{predictions}: {len(missing)} photos have no result file ({', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''})"
        )
        if not skip_missing:
            raise InputError(f"{lack}; write one, with a count of 0 where nothing was found, or skip what is missing")
        _log.warning("%s; they are left out", lack)
    if len(events) < len(known_events):
        _log.warning(
            "%s: %d of %d events have no result files and are left out, such as %s",
            predictions,
            len(known_events - events),
            len(known_events),
            min(known_events - events),
        )
    unknown = Difficulty(np.empty((0, 4), np.float32), dict.fromkeys(DIFFICULTIES, np.empty(0, np.bool_)))
    photos = [truth.get(name, unknown) for name in detections]
    curves = subset_curves(
        list(detections.values()), [photo.boxes for photo in photos], [photo.counted for photo in photos], iou_threshold
    )
    return {subset: area_under(curve) for subset, curve in curves.items()}


def _event(name: str) -> str:
    return name.split("/", maxsplit=1)[0]


class PhotosSeen(NamedTuple):
    """Photos as arrays, as the functions above take them.

    Attributes:
        image_ids: the photos' numbers.
        detections: per photo ``(N, 5)`` float32, xyxy and score.
        faces: per photo ``(M, 4)`` float32, every annotated face.
        counted: per photo, subset name to ``(M,)`` bool, which of its faces count.
    """

    image_ids: list[int]
    detections: list[NDArray[np.float32]]
    faces: list[NDArray[np.float32]]
    counted: list[dict[str, NDArray[np.bool_]]]


class WiderFaceAP(torchmetrics.Metric):
    """Average precision with the WIDER FACE protocol, over all photos seen by all processes.

    A photo that is seen twice (a distributed sampler repeats some, to give every process as many) counts once, and
    the order of the photos, the batches and the processes makes no difference.

    Args:
        iou_threshold: the smallest overlap at which a detection belongs to a face.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, iou_threshold: float = 0.5) -> None:
        super().__init__()
        self.iou_threshold = iou_threshold
        # Flat rows can be joined whatever the photos' numbers of faces. A row of `photos` is: image id, number of
        # detections, number of faces, and for each of SUBSETS whether the photo takes part in it.
        self._empty = {
            "photos": torch.empty((0, 3 + len(SUBSETS)), dtype=torch.int64),
            "detections": torch.empty((0, 5), dtype=torch.float32),
            "faces": torch.empty((0, 4), dtype=torch.float32),
            "counted": torch.empty((0, len(SUBSETS)), dtype=torch.uint8),
        }
        for name in self._empty:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        image_ids: Tensor,
        detections: Sequence[Tensor],
        faces: Sequence[Tensor],
        counted: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Add a batch of photos.

        Args:
            image_ids: ``(B,)`` int64, which photo it is: the same number is the same photo.
            detections: per photo ``(N, 5)``, xyxy in photo pixels and score.
            faces: per photo ``(M, 4)``, every annotated face, xyxy in photo pixels.
            counted: per photo, subset name (one of ``SUBSETS``) to ``(M,)`` bool, which of its faces count.

        Raises:
            ValueError: the arguments differ in length, a shape does not fit, or a subset is unknown.
        """
        if not len(image_ids) == len(detections) == len(faces) == len(counted):
            raise ValueError("image_ids, detections, faces and counted must hold one entry per photo")
        for image_id, rows, boxes, masks in zip(image_ids.tolist(), detections, faces, counted, strict=True):
            if unknown := set(masks) - set(SUBSETS):
                raise ValueError(f"counted: unknown subset {min(unknown)!r}; known are {', '.join(SUBSETS)}")
            if rows.numel() != 5 * len(rows) or boxes.numel() != 4 * len(boxes):
                raise ValueError(f"expected (N, 5) and (M, 4), got {tuple(rows.shape)} and {tuple(boxes.shape)}")
            if any(mask.shape != (len(boxes),) for mask in masks.values()):
                raise ValueError(f"counted: expected one value for each of the photo's {len(boxes)} faces")
            absent = torch.zeros(len(boxes), dtype=torch.bool)
            columns = [masks.get(subset, absent).to(self.device, torch.uint8) for subset in SUBSETS]
            photo = [image_id, len(rows), len(boxes), *(subset in masks for subset in SUBSETS)]
            self._append("photos", torch.tensor([photo]))
            self._append("detections", rows.reshape(-1, 5))
            self._append("faces", boxes.reshape(-1, 4))
            self._append("counted", torch.stack(columns, dim=1))

    def photos_seen(self) -> PhotosSeen:
        """The photos so far, of this process; of all, within ``sync_context()``.

        Returns:
            Every photo once, in order of its number.
        """
        photos = self._joined("photos").cpu().numpy()
        image_ids, once = np.unique(photos[:, 0], return_index=True)
        detections = _split(self._joined("detections"), photos[:, 1])
        faces = _split(self._joined("faces"), photos[:, 2])
        masks = _split(self._joined("counted"), photos[:, 2])
        return PhotosSeen(
            image_ids.tolist(),
            [detections[i] for i in once],
            [faces[i] for i in once],
            [
                {
                    subset: masks[i][:, column].astype(bool)
                    for column, subset in enumerate(SUBSETS)
                    if photos[i, 3 + column]
                }
                for i in once
            ],
        )

    def compute(self) -> dict[str, Tensor]:
        """Compute the average precision of every subset that a photo came with.

        Returns:
            Subset name to a float32 scalar: 0 without detections, NaN where no face of the subset counts.
        """
        seen = self.photos_seen()
        curves = subset_curves(seen.detections, seen.faces, seen.counted, self.iou_threshold)
        return {
            subset: torch.tensor(area_under(curves[subset]), dtype=torch.float32, device=self.device)
            for subset in SUBSETS
            if subset in curves
        }

    def sync(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: object | None = None,
        should_sync: bool = True,
        distributed_available: Callable | None = None,
    ) -> None:
        """Exchange the states between processes; see :meth:`torchmetrics.Metric.sync`."""
        # torchmetrics stands in for the empty state of a process without photos with a float vector, which cannot be
        # gathered with the tables of the others.
        if not self._is_synced:
            for name in self._empty:
                setattr(self, name, [self._joined(name)])
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _append(self, name: str, rows: Tensor) -> None:
        getattr(self, name).append(rows.detach().to(self.device, self._empty[name].dtype))

    def _joined(self, name: str) -> Tensor:
        """Join a state, which is a list of tables before and one table after synchronisation."""
        value: Tensor | list[Tensor] = getattr(self, name)
        tables = [value] if isinstance(value, Tensor) else value
        return torch.cat(tables or [self._empty[name].to(self.device)])


def _split(rows: Tensor, counts: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(rows.cpu().numpy(), np.cumsum(counts)[:-1])
