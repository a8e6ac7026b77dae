"""What faces are looked for in: photos, videos and cameras."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaface.data.annotations import IMAGE_SUFFIXES, find_photos
from retinaface.errors import InputError

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv"}
)

_NOTED = ".detections"

# A file, or the number of a camera.
Source = Path | int

_USUAL_FPS = 25.0


class Sources(NamedTuple):
    """What is meant by words of a command line.

    Attributes:
        found: Each once, in the order of the words, those of one word sorted by name. A file that does not exist is a
            source: who reads it will say so.
        empty: A message for each word that nothing was found for, and for each folder that cannot be looked into.
        left_out: Suffixes of other files in the folders, in lower case, and how many there are of each.
    """

    found: list[Source]
    empty: list[str]
    left_out: Counter[str]


def find_sources(arguments: Sequence[str], out: Path) -> Sources:
    """Finds what is meant by words of a command line.

    Args:
        arguments: Files; folders, which are searched with all below them; patterns such as ``photos/**/*.jpg``; numbers
            of cameras.
        out: Folder of results, which are not taken for photos where it is below one of the folders. In one of the
            folders itself, what earlier runs have written there is not.

    Returns:
        What there is.
    """
    sources: list[Source] = []
    empty = []
    closed: dict[str, str] = {}
    others: set[Path] = set()

    def files_at(path: Path) -> list[Path]:
        """The file, or the photos and videos in a folder."""
        if not path.is_dir():
            return [path]
        names = find_photos(path, {""}, lambda error: closed.update({error.filename: error.strerror}))
        files = _without_results([path / name for name in names], path, out)
        others.update(file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        return [file for file in files if file not in others]

    for argument in arguments:
        found = _meant_by(argument, out, files_at)
        sources += found
        if not found:
            empty.append(f"{argument}: no photo or video there; check the path, and put patterns in quotes")
    empty += [f"{folder}: cannot be looked into ({reason}); check its permissions" for folder, reason in closed.items()]
    left_out = Counter(path.suffix.lower() or "without suffix" for path in others)
    return Sources(list(dict.fromkeys(sources)), empty, left_out)


def _meant_by(argument: str, out: Path, files_at: Callable[[Path], list[Path]]) -> Sequence[Source]:
    path = Path(argument)
    if path.exists():
        return files_at(path)
    if argument.isdecimal():
        return [int(argument)]
    if any(sign in argument for sign in "*?["):
        matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 (that of Path takes no absolute pattern)
        files = [file for match in matches for file in files_at(Path(match))]
        return _without_results(files, Path.cwd(), out)
    return [path]


def _without_results(files: list[Path], folder: Path, out: Path) -> list[Path]:
    """Leaves out what lies in the folder of results, or in the folder itself what earlier runs have written there."""
    results, whole = out.resolve(), folder.resolve()
    if not results.is_relative_to(whole):
        return files
    if results == whole:
        earlier = {results / name for name in earlier_results(out)}
        return [file for file in files if file.resolve() not in earlier]
    return [file for file in files if not file.resolve().is_relative_to(results)]


def earlier_results(out: Path) -> set[str]:
    """Names of the files that earlier runs have written to a folder, see :func:`note_result`; it need not be there."""
    try:
        return {os.fsdecode(name) for name in (out / _NOTED).read_bytes().split(b"\0")}
    except OSError:
        return set()


def note_result(out: Path, name: str) -> None:
    """Notes that a file in a folder will be a result: before it is written, as the run may be killed.

    Args:
        out: The folder.
        name: Of the file.

    Raises:
        OSError: Nothing can be written there.
    """
    with (out / _NOTED).open("ab") as file:
        file.write(os.fsencode(name) + b"\0")


def is_photo(source: Source) -> bool:
    """Whether it is neither camera nor video, by the name."""
    return isinstance(source, Path) and source.suffix.lower() not in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Video:
    """An opened video or camera; gives its frames, ``(H, W, 3)`` uint8 BGR, once.

    Attributes:
        source: What it was opened from.
        fps: Frames per second.
        count: Frames that are expected, in a file usually exact; 0 where nobody knows.
        limit: Frames that are given at most; None for all.
    """

    source: Source
    fps: float
    count: int
    limit: int | None
    _capture: Any

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        try:
            number = 0
            while number != self.limit:
                there, frame = self._capture.read()
                if not there:
                    return
                number += 1
                yield np.asarray(frame, np.uint8)
        finally:
            self._capture.release()

    def lacks(self, frames: int) -> bool:
        """Whether it has ended too early, if this many frames were read.

        The number of frames that a file says it has may be off by a few; 2 % are allowed, 2 at least and a second at
        most.
        """
        allowed = 0 if isinstance(self.source, int) else min(self.fps, max(2, 0.02 * self.count))
        return self.count - frames > allowed or not frames


def open_video(source: Source, limit: int | None = None) -> Video:
    """Opens a video or a camera.

    Args:
        source: The file, or the number of the camera.
        limit: Frames to read at most.

    Returns:
        The video.

    Raises:
        InputError: There is no such camera, or the file is not a video.
    """
    if isinstance(source, Path) and not source.is_file():
        raise InputError(f"{source}: no such file; check the path")
    level = cv2.utils.logging.getLogLevel()
    # What it says of each of its ways to open one is many lines; ours, below, says what to do.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    finally:
        cv2.utils.logging.setLogLevel(level)
    if not capture.isOpened():
        if isinstance(source, int):
            raise InputError(f"camera {source}: cannot be opened; check that it is connected and not in use")
        raise InputError(f"{source}: truncated or not a video; copy or download it again, or remove it")
    fps = capture.get(cv2.CAP_PROP_FPS)
    count = 0 if isinstance(source, int) else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    if limit is not None:
        count = min(count, limit) or limit
    return Video(source, fps if 0 < fps < 1000 else _USUAL_FPS, count, limit, capture)
