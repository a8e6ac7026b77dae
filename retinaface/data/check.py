"""Looks through a data root before training does: what there is, what is odd, and which files are broken."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from retinaface.cpus import usable_cpus
from retinaface.data.annotations import Sample, Split, images_folder, read_image, read_split
from retinaface.errors import InputError
from retinaface.progress import with_progress

SIZE_EDGES = (8, 16, 32, 64, 128, 256)
"""Pixels of a face's shorter side at which a new size class begins."""

_SIZE_CLASSES = (
    f"below {SIZE_EDGES[0]} px",
    *(f"{low}-{high} px" for low, high in pairwise(SIZE_EDGES)),
    f"{SIZE_EDGES[-1]} px and more",
)
_MOST_EVENTS = 100  # WIDER FACE has 61


class EventCount(NamedTuple):
    """Photos of an event, and the faces that count in them."""

    photos: int
    faces: int


@dataclass(frozen=True, eq=False)
class SplitCheck:
    """What a split holds. A face *counts* if it has a size and is not flagged invalid.

    Attributes:
        split: ``train`` or ``val``.
        photos: Annotated photos that are there.
        photos_without_faces: Those of them in which no face counts.
        annotated: Annotated faces: those that count, those without size and those flagged invalid.
        faces: Faces that count. All figures below are about these.
        without_size: Annotated faces without width or height.
        invalid: Annotated faces with a size that are flagged invalid.
        beyond_photo: Faces that reach beyond their photo.
        outside_photo: Photo and number of its faces that lie wholly outside, ``path: number``.
        with_landmarks: Faces with all five landmarks.
        sizes: Size class, by the shorter side, to number of faces.
        subsets: ``easy``, ``medium`` and ``hard`` to number of faces; empty without the official ``.mat`` files.
        events: Event, the folder of a photo, to its counts.
        absent: Annotated photos that are not there.
        absent_is_fine: Whether training and evaluation leave them out: only those of the ``.mat`` files.
        unlisted: Photos that are there without being annotated, relative to the images folder.
        unreadable: A line per photo that cannot be decoded or is truncated, with its path.
        short_sides: ``(faces,)`` float32, shorter sides in pixels.
    """

    split: Split
    photos: int
    photos_without_faces: int
    annotated: int
    faces: int
    without_size: int
    invalid: int
    beyond_photo: int
    outside_photo: list[str]
    with_landmarks: int
    sizes: dict[str, int]
    subsets: dict[str, int]
    events: dict[str, EventCount]
    absent: list[str]
    absent_is_fine: bool
    unlisted: list[str]
    unreadable: list[str]
    short_sides: NDArray[np.float32]

    @property
    def broken(self) -> list[str]:
        """A line per file that training would stumble over, with its path."""
        absent = (
            [] if self.absent_is_fine else [f"{path}: listed in the annotations but absent" for path in self.absent]
        )
        return absent + self.unreadable


def check_root(root: Path | str) -> list[SplitCheck]:
    """Reads all annotations and decodes every photo of the splits that are there, with a progress bar.

    Args:
        root: A data root in WIDER FACE layout, with training photos, validation photos or both.

    Returns:
        ``train`` and ``val``, as far as ``WIDER_{split}/images`` is there.

    Raises:
        InputError: There is no split, or the annotations of one are missing or malformed.
    """
    splits = [split for split in get_args(Split) if (Path(root) / f"WIDER_{split}" / "images").is_dir()]
    return [_check_split(Path(root), split) for split in splits or get_args(Split)]


def check_tables(checks: Sequence[SplitCheck]) -> list[Table]:
    """Lays the figures out for the terminal.

    Args:
        checks: What ``check_root`` returned.

    Returns:
        Counts, size classes and events, each with a column per split. Of many events those with most faces are shown.
    """
    counts = _table("photos and faces", [check.split for check in checks])
    for heading, values in _count_rows(checks):
        counts.add_row(heading, *(f"{value:,}" for value in values))
    sizes = _table("faces by shorter side", [check.split for check in checks])
    for name in _SIZE_CLASSES:
        sizes.add_row(name, *(_share(check.sizes[name], check.faces) for check in checks))
    return [counts, sizes, _event_table(checks)]


def find_unreadable(samples: Sequence[Sample], description: str) -> list[str]:
    """Decodes every photo, with a progress bar.

    Args:
        samples: The photos.
        description: What the progress bar says.

    Returns:
        A line per photo that cannot be decoded or is truncated, with its path.
    """
    return _decode_all(samples, description)[1]


def _check_split(root: Path, split: Split) -> SplitCheck:
    images = images_folder(root, split)
    index = read_split(root, split)
    samples = index.samples
    shapes, unreadable = _decode_all(samples, f"reading the photos of {split}")
    boxes = np.concatenate([np.empty((0, 4), np.float32), *(sample.boxes for sample in samples)])
    counted = _concatenate([sample.counted["all"] for sample in samples])
    has_size = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    limits = np.repeat(shapes, [len(sample.boxes) for sample in samples], axis=0)
    beyond = counted & ((boxes[:, :2] < 0) | (boxes[:, 2:] > limits)).any(axis=1)
    outside = counted & ((boxes[:, 2:] <= 0) | (boxes[:, :2] >= limits)).any(axis=1)
    owners = np.repeat(np.arange(len(samples)), [len(sample.boxes) for sample in samples])
    short_sides = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)[counted]
    classes = np.bincount(np.digitize(short_sides, SIZE_EDGES), minlength=len(_SIZE_CLASSES))
    return SplitCheck(
        split=split,
        photos=len(samples),
        photos_without_faces=sum(not sample.counted["all"].any() for sample in samples),
        annotated=len(boxes),
        faces=int(counted.sum()),
        without_size=int((~has_size).sum()),
        invalid=int((has_size & ~counted).sum()),
        beyond_photo=int(beyond.sum()),
        outside_photo=[f"{samples[owner].path}: {count}" for owner, count in sorted(Counter(owners[outside]).items())],
        with_landmarks=sum(_with_landmarks(sample) for sample in samples),
        sizes=dict(zip(_SIZE_CLASSES, classes.tolist(), strict=True)),
        subsets=_subset_counts(samples),
        events=_event_counts(samples),
        absent=[str(images / name) for name in index.absent],
        absent_is_fine=index.official and bool(samples),
        unlisted=index.unlisted,
        unreadable=unreadable,
        short_sides=short_sides,
    )


def _decode_all(samples: Sequence[Sample], description: str) -> tuple[NDArray[np.float64], list[str]]:
    """``(N, 2)`` widths and heights, NaN where unreadable, and what is wrong with those."""
    sizes = np.full((len(samples), 2), np.nan)
    problems = []
    # Threads, as OpenCV decodes without holding Python's lock.
    with ThreadPoolExecutor(usable_cpus()) as pool:
        results = pool.map(_decode, [sample.path for sample in samples])
        for _, row, result in zip(with_progress(samples, description), sizes, results, strict=True):
            if isinstance(result, str):
                problems.append(result)
            else:
                row[:] = result
    return sizes, problems


def _decode(path: Path) -> tuple[int, int] | str:
    """Width and height, or what is wrong."""
    try:
        height, width = read_image(path).shape[:2]
    except InputError as error:
        return str(error)
    return width, height


def _with_landmarks(sample: Sample) -> int:
    return int((np.isfinite(sample.landmarks).all(axis=(1, 2)) & sample.counted["all"]).sum())


def _subset_counts(samples: Sequence[Sample]) -> dict[str, int]:
    subsets = [subset for subset in (samples[0].counted if samples else ()) if subset != "all"]
    return {subset: int(sum(sample.counted[subset].sum() for sample in samples)) for subset in subsets}


def _event_counts(samples: Sequence[Sample]) -> dict[str, EventCount]:
    photos: Counter[str] = Counter()
    faces: Counter[str] = Counter()
    for sample in samples:
        event = sample.name.rpartition("/")[0] or "."
        photos[event] += 1
        faces[event] += int(sample.counted["all"].sum())
    return {event: EventCount(photos[event], faces[event]) for event in photos}


def _concatenate(masks: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.concatenate([np.empty(0, dtype=bool), *masks])


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _count_rows(checks: Sequence[SplitCheck]) -> list[tuple[str, list[int]]]:
    rows = [
        ("photos", [check.photos for check in checks]),
        ("  in which no face counts", [check.photos_without_faces for check in checks]),
        ("  absent", [len(check.absent) for check in checks]),
        ("  unreadable or truncated", [len(check.unreadable) for check in checks]),
        ("  there but not annotated", [len(check.unlisted) for check in checks]),
        ("annotated faces", [check.annotated for check in checks]),
        ("  without width or height", [check.without_size for check in checks]),
        ("  flagged invalid", [check.invalid for check in checks]),
        ("faces that count", [check.faces for check in checks]),
        ("  with five landmarks", [check.with_landmarks for check in checks]),
        ("  reaching beyond the photo", [check.beyond_photo for check in checks]),
    ]
    for subset in dict.fromkeys(subset for check in checks for subset in check.subsets):
        rows.append((f"  {subset} by the .mat files", [check.subsets.get(subset, 0) for check in checks]))
    return rows


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else "0"


def _event_table(checks: Sequence[SplitCheck]) -> Table:
    """The events with most faces, and the others in one row."""
    table = _table(
        "events, by faces that count", [f"{check.split} {what}" for check in checks for what in ("photos", "faces")]
    )
    none = EventCount(0, 0)
    rows = {
        event: np.array([check.events.get(event, none) for check in checks])
        for event in dict.fromkeys(event for check in checks for event in check.events)
    }
    ordered = sorted(rows, key=lambda event: (-rows[event][:, 1].sum(), event))
    for event in ordered[:_MOST_EVENTS]:
        table.add_row(event, *(f"{value:,}" for value in rows[event].ravel()))
    if others := ordered[_MOST_EVENTS:]:
        rest = np.sum([rows[event] for event in others], axis=0)
        table.add_row(f"{len(others)} others", *(f"{value:,}" for value in rest.ravel()))
    return table
