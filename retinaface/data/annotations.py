"""Reads photos and their faces from the WIDER FACE layout, the RetinaFace labels and the official ``.mat`` files.

All coordinates are pixels of the stored photo, measured from its top left corner: pixel ``i`` covers ``[i, i + 1)``.
"""

import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
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

MIRRORED_LANDMARKS = [1, 0, 2, 4, 3]
"""Whose place each landmark takes in a mirrored photo: the eyes and the mouth corners change sides."""

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
DIFFICULTIES = ("easy", "medium", "hard")
DIFFICULTY_FILES = ("wider_face_val.mat", *(f"wider_{subset}_val.mat" for subset in DIFFICULTIES))
"""The official ground truth: all faces, and which of them count in each subset."""

_INVALID_COLUMN = 7  # x y w h blur expression illumination INVALID occlusion pose
_NO_LANDMARKS = [-1.0] * 15
_SIZED_HEADER = re.compile(rf"(.+(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))\s+\d+\s+\d+", re.IGNORECASE)


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
        labelled: Whether somebody said where the faces are; without, there are none here, whatever the photo shows.
    """

    path: Path
    name: str
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    counted: dict[str, NDArray[np.bool_]]
    labelled: bool = True

    def read(self) -> NDArray[np.uint8]:
        """Reads the photo, ``(H, W, 3)`` uint8 BGR: as it is stored, which is what boxes refer to; else upright.

        Raises:
            InputError: See :func:`read_image`.
        """
        return read_image(self.path, upright=not self.labelled)


class Difficulty(NamedTuple):
    """The official faces of one validation photo.

    Attributes:
        boxes: ``(N, 4)`` float32, ``x1, y1, x2, y2`` in pixels with ``x2 = x1 + width``, the protocol's convention.
        counted: ``easy``, ``medium`` and ``hard``, each ``(N,)`` bool: the faces that count in this subset.
    """

    boxes: NDArray[np.float32]
    counted: dict[str, NDArray[np.bool_]]


class SplitIndex(NamedTuple):
    """A split as annotated, compared with the photos that are there.

    Attributes:
        samples: The annotated photos that are there, in order.
        absent: Annotated photos that are not there, relative to the images folder.
        unlisted: Photos that are there without being annotated, relative to the images folder.
        official: Whether the official ``.mat`` files decided about photos, boxes and difficulty.
    """

    samples: list[Sample]
    absent: list[str]
    unlisted: list[str]
    official: bool


class _Entry(NamedTuple):
    """A photo in an annotation file: its line, its path and its number of faces."""

    line: int
    name: str
    faces: int


def load_split(root: Path | str, split: Split) -> list[Sample]:
    """Reads one split of a data root in WIDER FACE layout.

    Photos lie in ``WIDER_{split}/images``. Faces come from ``wider_face_split/wider_face_{split}_bbx_gt.txt``, or from
    a RetinaFace label file (``wider_face_split/label_{split}.txt``, ``WIDER_{split}/label.txt`` or
    ``{split}/label.txt``; ``labelv2`` in place of ``label`` too), which also has landmarks and wins when both are
    there. For ``val`` the four official ``.mat`` files, if found in the root, ``wider_face_split/``,
    ``ground_truth/`` or ``eval_tools/ground_truth/``, decide about photos, boxes and difficulty; photos of theirs that
    are absent are left out with a warning.

    Args:
        root: The data root.
        split: ``train`` or ``val``.

    Returns:
        At least one sample, in the order of the annotation file (of the event and file list with ``.mat`` files).

    Raises:
        InputError: A folder or file is missing, malformed or empty, or a listed photo is absent.
    """
    return usable_samples(read_split(root, split), images_folder(root, split))


def load_unlabelled(root: Path | str, split: Split) -> list[Sample]:
    """Finds photos to learn from without labels, from a teacher alone.

    Those for ``train`` lie in ``WIDER_train/images``, or anywhere below the root where that folder is absent; labels
    of theirs are not looked at. Those for ``val`` lie in ``WIDER_val/images``, and keep their labels if there are any,
    as for ``load_split``: a few labelled photos are enough to measure on. Where that folder is absent, one in ten of
    the photos, at equal distances, is for ``val`` and the others are for ``train``.

    Args:
        root: Any folder with photos.
        split: ``train`` or ``val``.

    Returns:
        At least one sample, sorted by path; labelled only for ``val``, if at all.

    Raises:
        InputError: There is no such folder, or there are no photos (or a single one, to be shared by two splits); the
            labels for ``val`` are wrong.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give a folder with photos")
    validation = root / "WIDER_val" / "images"
    if split == "val" and validation.is_dir():
        labelled = bool(annotation_files(root, "val"))
        return load_split(root, "val") if labelled else _photos_alone(validation, find_photos(validation))
    images = root / "WIDER_train" / "images"
    images = images if images.is_dir() else root
    samples = _photos_alone(images, [name for name in find_photos(images) if not name.startswith("WIDER_val/images/")])
    if validation.is_dir():
        return samples
    if len(samples) == 1:
        raise InputError(f"{images}: holds a single photo; give more, as one in ten is kept for validation")
    held_out = evenly_spread(samples, max(1, len(samples) // 10))
    if split == "val":
        return held_out
    kept = set(samples) - set(held_out)
    return [sample for sample in samples if sample in kept]


def read_split(root: Path | str, split: Split) -> SplitIndex:
    """Reads one split as ``load_split`` does, but leaves it to the caller what to do about absent photos.

    Args:
        root: The data root.
        split: ``train`` or ``val``.

    Returns:
        The samples, and where annotations and photos differ.

    Raises:
        InputError: A folder or file is missing, malformed or empty.
    """
    root, images = Path(root), images_folder(root, split)
    samples = _read_text_files(root, split, images)
    photos = find_photos(images)
    truth_folder = _find_difficulty(root) if split == "val" else None
    if truth_folder is not None:
        return _with_difficulty(samples or [], read_difficulty(truth_folder), photos, images)
    if samples is None:
        looked_for = " or ".join(str(path) for path in (_wider_file(root, split), *_label_files(root, split)[:3]))
        raise InputError(
            f"{root}: no annotations for {split}; expected {looked_for} (to learn from a teacher alone, without "
            "labels: data.init_args.labels: false)"
        )
    listed = {sample.path.relative_to(images).as_posix(): sample for sample in samples}
    found = set(photos)
    # The listing holds pictures of the usual kinds; for others the disk is asked.
    absent = [name for name, sample in listed.items() if name not in found and not sample.path.is_file()]
    for name in absent:
        del listed[name]
    unlisted = [name for name in photos if name not in listed]
    return SplitIndex(list(listed.values()), absent, unlisted, official=False)


def usable_samples(index: SplitIndex, images: Path) -> list[Sample]:
    """The samples to train or evaluate on.

    Args:
        index: A split.
        images: Its images folder, for the messages.

    Returns:
        At least one sample. A warning says how many of the official photos are absent.

    Raises:
        InputError: A photo of a text file is absent, or all photos of the ``.mat`` files are.
    """
    if index.absent and not index.official:
        more = f" and {len(index.absent) - 1} more" if len(index.absent) > 1 else ""
        raise InputError(
            f"{images / index.absent[0]}{more}: listed in the annotations but absent; unpack all photos into {images} "
            "or remove their lines"
        )
    if not index.samples:
        raise InputError(f"{images}: none of the photos that the .mat files name is there; unpack WIDER_val.zip")
    if index.absent:
        _log.warning(
            "%s: %d of the %d official photos are there; the others are left out, so the figures are not the "
            "official ones",
            images,
            len(index.samples),
            len(index.samples) + len(index.absent),
        )
    return index.samples


def images_folder(root: Path | str, split: Split) -> Path:
    """The folder that the photos' paths start from.

    Args:
        root: The data root.
        split: ``train`` or ``val``.

    Returns:
        ``WIDER_{split}/images``.

    Raises:
        InputError: It is missing.
    """
    images = Path(root) / f"WIDER_{split}" / "images"
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder; give the folder that holds WIDER_train/ and wider_face_split/")
    if not images.is_dir():
        raise InputError(
            f"{images}: no such folder; {root} must be in WIDER FACE layout (unpack WIDER_{split}.zip; training does "
            "so, and fetches it with data.init_args.download: true; photos in any folder are enough to learn from a "
            "teacher alone, without labels, with data.init_args.labels: false)"
        )
    return images


def _warn_of(error: OSError) -> None:
    _log.warning("%s: cannot be looked into, left out (%s)", error.filename, error.strerror)


def find_photos(
    images: Path, suffixes: Collection[str] = IMAGE_SUFFIXES, on_error: Callable[[OSError], None] = _warn_of
) -> list[str]:
    """Lists the pictures below a folder, by one walk: on a network disk that costs far less than asking for each.

    Args:
        images: The folder; links to folders are followed.
        suffixes: What the names may end in, in lower case.
        on_error: What happens where a folder cannot be looked into; by default a warning.

    Returns:
        Paths relative to the folder with ``/`` between their parts, sorted; hidden files and folders are left out.
    """
    photos = []
    for folder, folders, files in os.walk(images, onerror=on_error, followlinks=True):
        # A link to a folder above would be followed forever.
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if name[0] != "." and not here.is_relative_to((here / name).resolve())]
        inside = Path(folder).relative_to(images).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        photos += [f"{prefix}{file}" for file in files if file.lower().endswith(tuple(suffixes)) and file[0] != "."]
    return sorted(photos)


def annotation_files(root: Path | str, split: Split) -> list[Path]:
    """The files whose content makes a split, besides the photos.

    Args:
        root: The data root.
        split: ``train`` or ``val``.

    Returns:
        Those that are there of the text files that ``read_split`` reads and of the ``.mat`` files.
    """
    root = Path(root)
    label_file = _label_file(root, split)
    files = [_wider_file(root, split), *([label_file] if label_file else [])]
    folder = _find_difficulty(root) if split == "val" else None
    if folder is not None:
        files += [folder / file for file in DIFFICULTY_FILES]
    return [file for file in files if file.is_file()]


def read_wider(file: Path, images: Path) -> list[Sample]:
    """Reads an official ``wider_face_*_bbx_gt.txt``.

    Each photo has a line with its path, a line with its number of faces and a line per face: ``x y width height``,
    optionally followed by ``blur expression illumination invalid occlusion pose``. A photo with 0 faces may be
    followed by a row without size that stands for no face, as in the official files. A photo that is listed again with
    the same faces is kept once, with a warning.

    Args:
        file: The annotation file.
        images: The folder that the paths start from; it is not looked at.

    Returns:
        At least one sample, in file order, without landmarks.

    Raises:
        InputError: The file is missing, not text, empty or malformed; or a photo is listed again with other faces, is
            told from another by its suffix alone, or lies outside ``images``.
    """
    lines = _read_lines(file)
    entries: list[_Entry] = []
    rows: list[list[float]] = []
    row_lines: list[int] = []
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
        of_photo = lines[at : at + count]
        if len(of_photo) < count:
            raise InputError(
                f"{file}:{number}: {name} should have {count} faces, but the file ends after {len(of_photo)}"
            )
        rows += [_wider_row(file, *line) for line in of_photo]
        row_lines += [line_number for line_number, _ in of_photo]
        at += count
        if count == 0 and at < len(lines):
            at += _is_dummy_row(file, *lines[at])
        entries.append(_Entry(number, name, count))
    table = _as_table(file, rows, row_lines, columns=5)
    landmarks = np.full((len(table), 5, 2), np.nan, dtype=np.float32)
    return _make_samples(file, images, entries, _to_corners(table[:, :4]), landmarks, valid=table[:, 4] == 0)


def read_label_txt(file: Path, images: Path) -> list[Sample]:
    """Reads a RetinaFace ``label.txt`` or ``labelv2.txt``: faces with five landmarks.

    A photo starts with ``# <path>``; each face is a line ``x y width height``, optionally followed by five times
    ``x y flag`` and a blur score. In InsightFace's second version
    (https://github.com/deepinsight/insightface/tree/master/detection/scrfd) a photo starts with
    ``# <path> <width> <height>`` and a face with ``x1 y1 x2 y2``; the header tells the two apart. There a fifth number
    may follow the box alone: 1 where the face is to be ignored. Landmarks of ``-1`` are not labelled; flags of 0 and 1
    tell visible and hidden ones, whose places are labelled alike.

    Args:
        file: The label file.
        images: The folder that the paths start from; it is not looked at.

    Returns:
        At least one sample, in file order; every face of positive size that is not to be ignored counts in ``all``.

    Raises:
        InputError: As for ``read_wider``; or only some photos are given with their size.
    """
    entries: list[_Entry] = []
    rows: list[list[float]] = []
    row_lines: list[int] = []
    sized: bool | None = None
    for number, line in _read_lines(file):
        if line.startswith("#"):
            name = line.removeprefix("#").strip()
            match = _SIZED_HEADER.fullmatch(name)
            if sized not in (None, match is not None):
                raise InputError(f"{file}:{number}: either all photos or none must be given with width and height")
            sized = match is not None
            entries.append(_Entry(number, match[1] if match else name, 0))
        elif entries:
            rows.append(_label_row(file, number, line, corners=bool(sized)))
            row_lines.append(number)
            entries[-1] = entries[-1]._replace(faces=entries[-1].faces + 1)
        else:
            raise InputError(f"{file}:{number}: expected '# <path of a photo>' before the first face")
    table = _as_table(file, rows, row_lines, columns=20)
    points = table[:, 5:].reshape(-1, 5, 3)
    unlabelled = (points[..., 2] < 0) | (points[..., :2] == -1).all(axis=-1)
    landmarks = np.where(unlabelled[..., None], np.float32(np.nan), points[..., :2])
    boxes = table[:, :4] if sized else _to_corners(table[:, :4])
    return _make_samples(file, images, entries, boxes, landmarks, valid=table[:, 4] == 0)


def read_difficulty(folder: Path) -> dict[str, Difficulty]:
    """Reads the official ground truth: ``wider_{face,easy,medium,hard}_val.mat``.

    Args:
        folder: The folder that holds the four files.

    Returns:
        Photo name (``<event>/<file name without suffix>``) to its faces, in the official order.

    Raises:
        InputError: A file is missing or is not one of these ``.mat`` files.
    """
    faces = _load_mat(folder / DIFFICULTY_FILES[0], ("event_list", "file_list", "face_bbx_list"))
    counted_lists = {subset: _load_mat(folder / f"wider_{subset}_val.mat", ("gt_list",)) for subset in DIFFICULTIES}
    truth = {}
    for event_index, event in enumerate(faces["event_list"]):
        files = faces["file_list"][event_index][0]
        for file_index, file in enumerate(files):
            xywh = faces["face_bbx_list"][event_index][0][file_index][0].reshape(-1, 4).astype(np.float32)
            counted = {}
            for subset, lists in counted_lists.items():
                mask = np.zeros(len(xywh), dtype=bool)
                one_based = lists["gt_list"][event_index][0][file_index][0].reshape(-1).astype(np.int64)
                if ((one_based < 1) | (one_based > len(xywh))).any():
                    raise InputError(
                        f"{folder / f'wider_{subset}_val.mat'}: names face {one_based.max()} of {file[0][0]}, which "
                        f"has {len(xywh)} in {DIFFICULTY_FILES[0]}; take all four files from one eval_tools.zip"
                    )
                mask[one_based - 1] = True
                counted[subset] = mask
            truth[f"{event[0][0]}/{file[0][0]}"] = Difficulty(_to_corners(xywh), counted)
    return truth


def evenly_spread(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """That many samples at equal distances, all if there are fewer: photos of one kind often lie side by side.

    Args:
        samples: In the order of their split.
        limit: How many; None takes all.

    Returns:
        The chosen ones, in the same order.
    """
    count = len(samples) if limit is None else min(limit, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def read_image(path: Path | str, upright: bool = False) -> NDArray[np.uint8]:
    """Reads a picture as annotated: in stored orientation, because boxes refer to the stored pixels.

    Args:
        path: A file of any format that OpenCV decodes.
        upright: Whether to turn it as its EXIF data say instead, as a person would see it.

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
    # From memory: imread fills what a truncated JPEG lacks with grey and says nothing.
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path}: truncated or not a picture; copy or download it again, or remove it")
    return np.asarray(image, dtype=np.uint8)


def _photos_alone(images: Path, names: Sequence[str]) -> list[Sample]:
    """Samples of photos without labels."""
    if not names:
        raise InputError(f"{images}: no photos there; expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
    no_boxes, no_landmarks = np.empty((0, 4), np.float32), np.empty((0, 5, 2), np.float32)
    nothing = {"all": np.empty(0, dtype=bool)}
    return [
        Sample(images / name, name.rpartition(".")[0], no_boxes, no_landmarks, nothing, labelled=False)
        for name in names
    ]


def _wider_file(root: Path, split: Split) -> Path:
    return root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt"


def _label_files(root: Path, split: Split) -> list[Path]:
    return [
        file
        for name in ("label", "labelv2")
        for file in (
            root / "wider_face_split" / f"{name}_{split}.txt",
            root / f"WIDER_{split}" / f"{name}.txt",
            root / split / f"{name}.txt",
        )
    ]


def _label_file(root: Path, split: Split) -> Path | None:
    return next((file for file in _label_files(root, split) if file.is_file()), None)


def _read_text_files(root: Path, split: Split, images: Path) -> list[Sample] | None:
    """Samples of the text annotations, or None where there are none."""
    wider_file, label_file = _wider_file(root, split), _label_file(root, split)
    if label_file is None:
        return read_wider(wider_file, images) if wider_file.is_file() else None
    samples = read_label_txt(label_file, images)
    if not wider_file.is_file():
        return samples
    # Label files have no invalid flag, and they may lack photos; the official file has both.
    official = {sample.name: sample for sample in read_wider(wider_file, images)}
    labelled = [
        replace(
            sample,
            counted={"all": sample.counted["all"] & _valid_like(sample.boxes, official.pop(sample.name, None))},
        )
        for sample in samples
    ]
    return [*labelled, *official.values()]


def _with_difficulty(
    samples: Sequence[Sample], truth: dict[str, Difficulty], photos: Sequence[str], images: Path
) -> SplitIndex:
    """Samples of the official photos that are present; landmarks and invalid flags come from equal boxes."""
    described = {sample.name: sample for sample in samples}
    files = {photo.rpartition(".")[0]: photo for photo in photos}
    merged = []
    for name, (boxes, counted) in truth.items():
        if name not in files:
            continue
        known = described.get(name)
        landmarks = np.full((len(boxes), 5, 2), np.nan, dtype=np.float32)
        if known is not None:
            match = _match_boxes(boxes, known.boxes)
            landmarks[match >= 0] = known.landmarks[match[match >= 0]]
        valid = _has_size(boxes) & _valid_like(boxes, known)
        merged.append(Sample(images / files[name], name, boxes, landmarks, {"all": valid, **counted}))
    absent = [f"{name}.jpg" for name in truth if name not in files]
    unlisted = [photo for name, photo in files.items() if name not in truth]
    return SplitIndex(merged, absent, unlisted, official=True)


def _valid_like(boxes: NDArray[np.float32], known: Sample | None) -> NDArray[np.bool_]:
    """``(N,)``: False where ``known`` has the same box and does not count it."""
    valid = np.ones(len(boxes), dtype=bool)
    if known is not None and not known.counted["all"].all():
        match = _match_boxes(boxes, known.boxes)
        valid[match >= 0] = known.counted["all"][match[match >= 0]]
    return valid


def _match_boxes(boxes: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.int64]:
    """``(N,)``: the row of ``known`` with the same whole-pixel box, or -1."""
    rows = {tuple(box): index for index, box in enumerate(np.rint(known).astype(np.int64).tolist())}
    return np.array([rows.get(tuple(box), -1) for box in np.rint(boxes).astype(np.int64).tolist()], dtype=np.int64)


def _find_difficulty(root: Path) -> Path | None:
    """The folder with the ``.mat`` files, or None."""
    for folder in (root, root / "wider_face_split", root / "ground_truth", root / "eval_tools" / "ground_truth"):
        if any((folder / file).is_file() for file in DIFFICULTY_FILES[1:]):
            return folder
    return None


def _read_lines(file: Path) -> list[tuple[int, str]]:
    """Line number and stripped text of the lines that are not blank."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); an annotation file was expected") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{file}:{number}: not UTF-8 text; save the annotations as UTF-8") from error
    # Not splitlines(), which also takes rare characters within a name for the end of a line.
    stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    lines = [(number, line) for number, line in stripped if line]
    if not lines:
        raise InputError(f"{file}: the file is empty; it must list at least one photo")
    return lines


def _as_numbers(line: str) -> list[float] | None:
    """The numbers of a line, or None if it holds anything else."""
    try:
        return [float(part) for part in line.split()]
    except ValueError:
        return None


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


def _is_dummy_row(file: Path, number: int, line: str) -> bool:
    """Whether the line after a photo without faces is the row of zeros that the official files write there."""
    numbers = _as_numbers(line)
    if numbers is not None and len(numbers) >= 4 and min(numbers[2:4]) > 0:
        raise InputError(f"{file}:{number}: found a face, but the photo above should have none; check its number")
    return numbers is not None


def _label_row(file: Path, number: int, line: str, corners: bool) -> list[float]:
    """The box, whether to ignore it, and five times ``x, y, flag``."""
    numbers = _as_numbers(line)
    if numbers is None or len(numbers) not in ((4, 5, 19, 20) if corners else (4, 19, 20)):
        raise InputError(
            f"{file}:{number}: expected 4 numbers (a box) or 19 or 20 (with five landmarks), found '{line[:40]}'"
        )
    if corners and (numbers[2] < numbers[0] or numbers[3] < numbers[1]):
        raise InputError(
            f"{file}:{number}: expected 'x1 y1 x2 y2' as the photos are given with their size, found '{line[:40]}'; "
            "remove width and height after the photos if the boxes are 'x y width height'"
        )
    ignored = numbers[4] if len(numbers) == 5 else 0.0
    return [*numbers[:4], ignored, *(numbers[4:19] if len(numbers) > 5 else _NO_LANDMARKS)]


def _as_table(file: Path, rows: list[list[float]], row_lines: list[int], columns: int) -> NDArray[np.float32]:
    """``(N, columns)``; one check for the whole file costs less than one per number."""
    with np.errstate(over="ignore"):  # found right below
        table = np.array(rows, dtype=np.float32).reshape(-1, columns)
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(bad):
        raise InputError(f"{file}:{row_lines[bad[0]]}: not all numbers are finite; expected 'x y width height ...'")
    return table


def _make_samples(
    file: Path,
    images: Path,
    entries: Sequence[_Entry],
    boxes: NDArray[np.float32],
    landmarks: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> list[Sample]:
    """Deals out the faces of a file to its photos, each photo once."""
    valid = valid & _has_size(boxes)
    samples: dict[str, Sample] = {}
    lines: dict[str, int] = {}
    end = 0
    for number, name, faces in entries:
        start, end = end, end + faces
        path = _photo_path(file, number, name)
        key = path.with_suffix("").as_posix()
        of_photo = slice(start, end)
        sample = Sample(images / path, key, boxes[of_photo], landmarks[of_photo], {"all": valid[of_photo]})
        if key in samples:
            _check_repetition(file, number, sample, lines[key], samples[key])
        else:
            samples[key], lines[key] = sample, number
    return list(samples.values())


def _photo_path(file: Path, number: int, name: str) -> PurePosixPath:
    path = PureWindowsPath(name)  # takes slashes of both kinds
    if path.anchor or ".." in path.parts or not path.name:
        raise InputError(f"{file}:{number}: expected the path of a photo within the images folder, found '{name[:80]}'")
    return PurePosixPath(path.as_posix())


def _check_repetition(file: Path, number: int, sample: Sample, first_number: int, first: Sample) -> None:
    """Learning one photo with two sets of faces would be learning a contradiction."""
    if sample.path != first.path:
        raise InputError(
            f"{file}:{number}: {sample.path.name} and the photo of line {first_number} are told apart by their suffix "
            "alone, which results leave out; rename one"
        )
    same = (
        np.array_equal(sample.boxes, first.boxes)
        and np.array_equal(sample.landmarks, first.landmarks, equal_nan=True)
        and np.array_equal(sample.counted["all"], first.counted["all"])
    )
    if not same:
        raise InputError(
            f"{file}:{number}: {sample.name} is listed again, with other faces than in line {first_number}; remove one"
        )
    _log.warning("%s:%d: %s is listed again, as in line %d; kept once", file, number, sample.name, first_number)


def _to_corners(xywh: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _has_size(boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.asarray((boxes[:, 2:] > boxes[:, :2]).all(axis=1), dtype=bool)


def _load_mat(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file}: no such file; the four files {', '.join(DIFFICULTY_FILES)} belong together")
    try:
        content: dict[str, Any] = loadmat(file, variable_names=keys)
    except Exception as error:  # scipy and zlib raise many kinds for what is damaged or no MATLAB file
        raise InputError(f"{file}: not a MATLAB file ({error}); take it from WIDER FACE's eval_tools.zip") from error
    if missing := [key for key in keys if key not in content]:
        raise InputError(f"{file}: lacks {', '.join(missing)}; take it from WIDER FACE's eval_tools.zip")
    return content
