"""Reads photos and their faces from the WIDER FACE layout, the RetinaFace labels and the official ``.mat`` files.

All coordinates are pixels of the stored photo, measured from its top left corner: pixel ``i`` covers ``[i, i + 1)``.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from retinaface.errors import InputError

_log = logging.getLogger(__name__)

Split = Literal["train", "val"]

MEAN_BGR = (104, 117, 123)
"""The mean colour that the public weights subtract: filled areas become zero."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
DIFFICULTIES = ("easy", "medium", "hard")
_MAT_FILES = {subset: f"wider_{subset}_val.mat" for subset in ("face", *DIFFICULTIES)}
_INVALID_COLUMN = 7  # x y w h blur expression illumination INVALID occlusion pose


@dataclass(frozen=True, eq=False)
class Sample:
    """One photo and its faces.

    Attributes:
        path: The image file.
        name: ``<event>/<file name without suffix>``, the key that the WIDER protocol uses.
        boxes: ``(N, 4)`` float32, ``x1, y1, x2, y2`` in pixels, as annotated: they may reach beyond the photo or be
            empty.
        landmarks: ``(N, 5, 2)`` float32 in pixels (left eye, right eye, nose, left and right mouth corner, as seen in
            the photo); NaN where not labelled.
        counted: Subset name to ``(N,)`` bool: the faces that count in it, the others being ignored. Always has
            ``all`` (faces of positive size that are not flagged invalid); ``easy``, ``medium`` and ``hard`` too where
            the official ``.mat`` files are there.
    """

    path: Path
    name: str
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    counted: dict[str, NDArray[np.bool_]]


class Difficulty(NamedTuple):
    """The official faces of one validation photo.

    Attributes:
        boxes: ``(N, 4)`` float32, ``x1, y1, x2, y2`` in pixels with ``x2 = x1 + width``, the protocol's convention.
        counted: ``easy``, ``medium`` and ``hard``, each ``(N,)`` bool: the faces that count in this subset.
    """

    boxes: NDArray[np.float32]
    counted: dict[str, NDArray[np.bool_]]


def load_split(root: Path | str, split: Split) -> list[Sample]:
    """Reads one split of a data root in WIDER FACE layout.

    Photos lie in ``WIDER_{split}/images``. Faces come from ``wider_face_split/wider_face_{split}_bbx_gt.txt``, or from
    a RetinaFace label file (``wider_face_split/label_{split}.txt``, ``WIDER_{split}/label.txt`` or
    ``{split}/label.txt``), which also has landmarks and wins when both are there. For ``val`` the four official
    ``.mat`` files, if found in the root, ``wider_face_split/``, ``ground_truth/`` or ``eval_tools/ground_truth/``,
    decide about photos, boxes and difficulty; photos of theirs that are absent are left out.

    Args:
        root: The data root.
        split: ``train`` or ``val``.

    Returns:
        At least one sample, in the order of the annotation file (of the event and file list with ``.mat`` files).

    Raises:
        InputError: A folder or file is missing, malformed or empty, or a listed photo is absent.
    """
    root = Path(root)
    images = root / f"WIDER_{split}" / "images"
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds WIDER_train/ and wider_face_split/")
    if not images.is_dir():
        raise InputError(f"{images}: no such folder; {root} must be in WIDER FACE layout (unpack WIDER_{split}.zip)")
    samples = _read_text_files(root, split, images)
    truth_folder = _find_difficulty(root) if split == "val" else None
    photos = _find_photos(images)
    if truth_folder is not None:
        return _with_difficulty(samples or [], read_difficulty(truth_folder), photos, truth_folder)
    if samples is None:
        looked_for = " or ".join(str(path) for path in (_wider_file(root, split), *_label_files(root, split)))
        raise InputError(f"{root}: no annotations for {split}; expected {looked_for}")
    _check_present(samples, set(photos.values()), images)
    return samples


def read_wider(file: Path, images: Path) -> list[Sample]:
    """Reads an official ``wider_face_*_bbx_gt.txt``.

    Each photo has a line with its path, a line with its number of faces and a line per face: ``x y width height``,
    optionally followed by ``blur expression illumination invalid occlusion pose``. A photo with 0 faces may be
    followed by a row that stands for no face, as in the official files.

    Args:
        file: The annotation file.
        images: The folder that the paths start from; it is not looked at.

    Returns:
        At least one sample, in file order, without landmarks.

    Raises:
        InputError: The file is missing, not text, empty or malformed.
    """
    lines = _read_lines(file)
    samples = []
    at = 0
    while at < len(lines):
        number, name = lines[at]
        if _as_numbers(name) is not None:
            raise InputError(
                f"{file}:{number}: found numbers where a photo's path was expected; "
                "check the number of faces of the photo above"
            )
        count = _face_count(file, lines, at + 1)
        at += 2
        rows = [_wider_row(file, *line) for line in lines[at : at + count]]
        if len(rows) < count:
            raise InputError(f"{file}:{number}: {name} should have {count} faces, but the file ends after {len(rows)}")
        at += count
        if count == 0 and at < len(lines) and _as_numbers(lines[at][1]) is not None:
            at += 1  # the official files write a row of zeros for photos without faces
        table = np.array(rows, dtype=np.float32).reshape(-1, 5)
        landmarks = np.full((len(table), 5, 2), np.nan, dtype=np.float32)
        samples.append(_make_sample(images, name, table[:, :4], landmarks, valid=table[:, 4] == 0))
    return samples


def read_label_txt(file: Path, images: Path) -> list[Sample]:
    """Reads a RetinaFace ``label.txt``: faces with five landmarks.

    A photo starts with ``# <path>``; each face is a line ``x y width height``, optionally followed by five times
    ``x y flag`` and a blur score. Landmarks of ``-1`` are not labelled.

    Args:
        file: The label file.
        images: The folder that the paths start from; it is not looked at.

    Returns:
        At least one sample, in file order; every face of positive size counts in ``all``.

    Raises:
        InputError: The file is missing, not text, empty or malformed.
    """
    photos: list[tuple[str, list[NDArray[np.float32]]]] = []
    for number, line in _read_lines(file):
        if line.startswith("#"):
            photos.append((line.lstrip("#").strip(), []))
        elif photos:
            photos[-1][1].append(_label_row(file, number, line))
        else:
            raise InputError(f"{file}:{number}: expected '# <path of a photo>' before the first face")
    samples = []
    for name, rows in photos:
        table = np.array(rows, dtype=np.float32).reshape(-1, 14)
        landmarks = table[:, 4:].reshape(-1, 5, 2)
        samples.append(_make_sample(images, name, table[:, :4], landmarks, valid=np.ones(len(table), dtype=bool)))
    return samples


def read_difficulty(folder: Path) -> dict[str, Difficulty]:
    """Reads the official ground truth: ``wider_{face,easy,medium,hard}_val.mat``.

    Args:
        folder: The folder that holds the four files.

    Returns:
        Photo name (``<event>/<file name without suffix>``) to its faces, in the official order.

    Raises:
        InputError: A file is missing or is not one of these ``.mat`` files.
    """
    faces = _load_mat(folder / _MAT_FILES["face"], ("event_list", "file_list", "face_bbx_list"))
    counted_lists = {subset: _load_mat(folder / _MAT_FILES[subset], ("gt_list",)) for subset in DIFFICULTIES}
    truth = {}
    for event_index, event in enumerate(faces["event_list"]):
        files = faces["file_list"][event_index][0]
        for file_index, file in enumerate(files):
            xywh = faces["face_bbx_list"][event_index][0][file_index][0].reshape(-1, 4).astype(np.float32)
            counted = {}
            for subset, lists in counted_lists.items():
                mask = np.zeros(len(xywh), dtype=bool)
                one_based = lists["gt_list"][event_index][0][file_index][0].reshape(-1)
                mask[one_based.astype(np.int64) - 1] = True
                counted[subset] = mask
            truth[f"{event[0][0]}/{file[0][0]}"] = Difficulty(_to_corners(xywh), counted)
    return truth


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Reads a picture as annotated: in stored orientation, because boxes refer to the stored pixels.

    Args:
        path: A file of any format that OpenCV decodes.

    Returns:
        ``(H, W, 3)`` uint8, BGR.

    Raises:
        InputError: The file is missing, truncated or not a picture.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    # OpenCV fills what a truncated file lacks with grey and says nothing: the end has to be looked for.
    if _is_truncated(content):
        raise InputError(f"{path}: the file is truncated; copy or download it again")
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path}: not a readable picture; replace or remove it")
    return np.asarray(image, dtype=np.uint8)


def _wider_file(root: Path, split: Split) -> Path:
    return root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt"


def _label_files(root: Path, split: Split) -> tuple[Path, ...]:
    return (
        root / "wider_face_split" / f"label_{split}.txt",
        root / f"WIDER_{split}" / "label.txt",
        root / split / "label.txt",
    )


def _read_text_files(root: Path, split: Split, images: Path) -> list[Sample] | None:
    """Samples of the text annotations, or None where there are none."""
    wider_file = _wider_file(root, split)
    label_file = next((file for file in _label_files(root, split) if file.is_file()), None)
    if label_file is None:
        return read_wider(wider_file, images) if wider_file.is_file() else None
    samples = read_label_txt(label_file, images)
    if not wider_file.is_file():
        return samples
    # Label files have no invalid flag; the official file does.
    flagged = {sample.name: sample for sample in read_wider(wider_file, images)}
    return [
        replace(sample, counted={"all": sample.counted["all"] & _valid_like(sample.boxes, flagged.get(sample.name))})
        for sample in samples
    ]


def _with_difficulty(
    samples: Sequence[Sample], truth: dict[str, Difficulty], photos: dict[str, Path], folder: Path
) -> list[Sample]:
    """Samples of the official photos that are present; landmarks and invalid flags come from equal boxes."""
    described = {sample.name: sample for sample in samples}
    merged = []
    for name, (boxes, counted) in truth.items():
        if name not in photos:
            continue
        known = described.get(name)
        landmarks = np.full((len(boxes), 5, 2), np.nan, dtype=np.float32)
        if known is not None:
            match = _match_boxes(boxes, known.boxes)
            landmarks[match >= 0] = known.landmarks[match[match >= 0]]
        valid = _has_size(boxes) & _valid_like(boxes, known)
        merged.append(Sample(photos[name], name, boxes, landmarks, {"all": valid, **counted}))
    if len(merged) < len(truth):
        _log.warning(
            "%s: %d of the %d official photos are in WIDER_val/images; the others are left out, so the figures are not "
            "the official ones",
            folder,
            len(merged),
            len(truth),
        )
    if not merged:
        raise InputError(
            f"{folder}: none of the photos that the .mat files name is in WIDER_val/images; unpack it there"
        )
    return merged


def _valid_like(boxes: NDArray[np.float32], known: Sample | None) -> NDArray[np.bool_]:
    """``(N,)``: False where ``known`` has the same box and does not count it."""
    valid = np.ones(len(boxes), dtype=bool)
    if known is not None:
        match = _match_boxes(boxes, known.boxes)
        valid[match >= 0] = known.counted["all"][match[match >= 0]]
    return valid


def _match_boxes(boxes: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.int64]:
    """``(N,)``: the row of ``known`` with the same whole-pixel box, or -1."""
    rows = {tuple(box): index for index, box in enumerate(np.rint(known).astype(np.int64).tolist())}
    return np.array([rows.get(tuple(box), -1) for box in np.rint(boxes).astype(np.int64).tolist()], dtype=np.int64)


def _find_photos(images: Path) -> dict[str, Path]:
    """Photo name to file. One walk over the folders costs far less than asking for each photo on a network disk."""
    photos = {}
    for folder, _, files in os.walk(images, followlinks=True):
        for file in sorted(files):
            path = Path(folder) / file
            if path.suffix.lower() in IMAGE_SUFFIXES:
                photos[path.relative_to(images).with_suffix("").as_posix()] = path
    return photos


def _find_difficulty(root: Path) -> Path | None:
    """The folder with the ``.mat`` files, or None."""
    for folder in (root, root / "wider_face_split", root / "ground_truth", root / "eval_tools" / "ground_truth"):
        if any((folder / file).is_file() for subset, file in _MAT_FILES.items() if subset != "face"):
            return folder
    return None


def _check_present(samples: Iterable[Sample], present: set[Path], images: Path) -> None:
    missing = [sample.path for sample in samples if sample.path not in present and not sample.path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{missing[0]}{more}: listed in the annotations but absent; unpack all photos into {images} "
            "or remove their lines"
        )


def _read_lines(file: Path) -> list[tuple[int, str]]:
    """Line number and stripped text of the lines that are not blank."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); an annotation file was expected") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text; an annotation file was expected") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{file}: the file is empty; it must list at least one photo")
    return lines


def _as_numbers(line: str) -> list[float] | None:
    """The finite numbers of a line, or None if it holds anything else."""
    try:
        numbers = [float(part) for part in line.split()]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _face_count(file: Path, lines: Sequence[tuple[int, str]], at: int) -> int:
    if at >= len(lines):
        raise InputError(f"{file}:{lines[-1][0]}: the number of faces was expected after the photo's path")
    number, line = lines[at]
    if not line.isdecimal():
        raise InputError(f"{file}:{number}: expected the number of faces, found '{line[:40]}'")
    return int(line)


def _wider_row(file: Path, number: int, line: str) -> list[float]:
    """``x, y, width, height, invalid``."""
    numbers = _as_numbers(line)
    if numbers is None or len(numbers) < 4:
        raise InputError(f"{file}:{number}: expected 'x y width height ...' of a face, found '{line[:40]}'")
    return [*numbers[:4], numbers[_INVALID_COLUMN] if len(numbers) > _INVALID_COLUMN else 0.0]


def _label_row(file: Path, number: int, line: str) -> NDArray[np.float32]:
    """``(14,)``: x, y, width, height and five landmarks, NaN where not labelled."""
    numbers = _as_numbers(line)
    if numbers is None or len(numbers) not in (4, 19, 20):
        raise InputError(
            f"{file}:{number}: expected 4 numbers (a box) or 19 or 20 (with five landmarks), found '{line[:40]}'"
        )
    row = np.full(14, np.nan, dtype=np.float32)
    row[:4] = numbers[:4]
    if len(numbers) > 4:
        points = np.array(numbers[4:19], dtype=np.float32).reshape(5, 3)
        unlabelled = (points[:, 2] < 0) | (points[:, :2] == -1).all(axis=1)
        row[4:] = np.where(unlabelled[:, None], np.nan, points[:, :2]).reshape(10)
    return row


def _make_sample(
    images: Path,
    name: str,
    xywh: NDArray[np.float32],
    landmarks: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> Sample:
    boxes = _to_corners(xywh)
    name = name.replace("\\", "/")
    key = PurePosixPath(name).with_suffix("").as_posix()
    return Sample(images / name, key, boxes, landmarks, {"all": valid & _has_size(boxes)})


def _to_corners(xywh: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _has_size(boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.asarray((boxes[:, 2:] > boxes[:, :2]).all(axis=1), dtype=bool)


def _load_mat(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file}: no such file; the four files {', '.join(_MAT_FILES.values())} belong together")
    try:
        content: dict[str, Any] = loadmat(file, variable_names=keys)
    except Exception as error:  # scipy and zlib raise many kinds for what is damaged or no MATLAB file
        raise InputError(f"{file}: not a MATLAB file ({error}); take it from WIDER FACE's eval_tools.zip") from error
    if missing := [key for key in keys if key not in content]:
        raise InputError(f"{file}: lacks {', '.join(missing)}; take it from WIDER FACE's eval_tools.zip")
    return content


def _is_truncated(content: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end; other formats are left to the decoder."""
    if content.startswith(b"\x89PNG"):
        return b"IEND\xaeB`\x82" not in content  # the last chunk's name and its checksum, which is always the same
    if not content.startswith(b"\xff\xd8"):
        return False
    # An embedded thumbnail has an end marker of its own, so walk over the header to where the picture's data start.
    # From there on the data escape 0xff, and ff d9 can only be the end; cameras may append bytes after it.
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # padding before a marker
            at += 1
            continue
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xDA:  # start of scan
            return content.find(b"\xff\xd9", at) < 0
    return True
