"""Finds faces in photos, videos and what a camera sees: annotated copies, a JSON file and a CSV file out."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaface.data.annotations import IMAGE_SUFFIXES, read_image
from retinaface.delivery.runtime import Detector
from retinaface.delivery.sources import Source, Video, earlier_results, is_photo, note_result, open_video
from retinaface.errors import InputError
from retinaface.model.postprocess import Detections
from retinaface.progress import in_parallel, with_progress
from retinaface.whole_file import whole_file

Draw = Callable[[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[np.uint8]]
# The faces in a picture, and a copy of it with them drawn on it.
Find = Callable[[NDArray[np.uint8]], tuple[Detections, NDArray[np.uint8]]]

_JSON, _CSV = "detections.json", "detections.csv"
_LANDMARKS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
_CSV_HEADER = (
    "source",
    "frame",
    "x1",
    "y1",
    "x2",
    "y2",
    "score",
    *(f"{name}_{axis}" for name in _LANDMARKS for axis in "xy"),
)


class VideoDetections(NamedTuple):
    """The faces found in a video.

    Attributes:
        frames_per_second: Of the video.
        frames: What was found in each frame, in order.
    """

    frames_per_second: float
    frames: list[Detections]


Found = dict[str, Detections | VideoDetections]


def detect_files(
    detector: Detector,
    sources: Sequence[Source],
    out: Path,
    draw: Draw,
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
    frames: int | None = None,
    longest: int | None = None,
) -> tuple[Found, list[str]]:
    """Detects faces and writes annotated copies, ``detections.json`` and ``detections.csv``.

    The JSON is an object from source, as given, to ``{"copy": ..., "boxes": [[x1, y1, x2, y2]], "scores": [],
    "landmarks": [[[x, y] x 5]]}``: the annotated copy's name, and faces in pixels; for a video to ``{"copy": ...,
    "frames_per_second": ..., "frames": [...]}`` with such an object, but for the copy, per frame. The CSV has a row per
    face: source, number of the frame from 0 (empty for photos), box, score and landmarks. Copies of videos are MP4
    files (MPEG-4, without sound). Each file appears only when it is complete; a run that is stopped or fails leaves
    what it has found so far, in a video too. What earlier runs have written to the folder is replaced; nothing else
    there is, and copies get a number where their name is taken.

    Args:
        detector: What finds them.
        sources: Photos, videos and numbers of cameras. A camera is looked at until ``frames`` or Ctrl-C.
        out: Folder to write to; made if need be.
        draw: Draws boxes ``(N, 4)``, scores ``(N,)`` and landmarks ``(N, 5, 2)`` on a copy of a picture.
        score_threshold: Faces with a lower score are dropped.
        nms_threshold: Of two boxes with a higher IoU the lower-scored one is dropped.
        frames: Of a video or camera, at most.
        longest: Pictures whose long side is above this many pixels are shrunk to it for the detector.

    Returns:
        Detections by source, and a message for each that could not be read, or not to its end, or not be copied.

    Raises:
        InputError: The folder cannot be written to, or has a ``detections.json`` or ``.csv`` that is not of a run.
    """
    found: dict[Source, Detections | VideoDetections] = {}
    messages: list[str] = []
    sources = list(dict.fromkeys(sources))
    earlier = earlier_results(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in {_JSON, _CSV} - earlier:
            if (out / name).exists():
                raise InputError(f"{out / name}: is not of an earlier run; choose another --out, or remove it")
        copies = _copies(sources, out, earlier)
    except OSError as error:
        raise InputError(f"{out}: cannot be written to as a folder ({error.strerror}); choose another --out") from error

    def look(photo: Source) -> str | None:
        """Finds what is in a photo, and says what is wrong, if anything; several threads do so at once."""
        try:
            picture = read_image(str(photo), upright=True)
        except InputError as error:
            return str(error)
        found[photo], drawn = find(picture)
        if _write_picture(drawn, copies[photo]):
            return None
        copy = copies.pop(photo)
        return f"{photo}: no copy, as a {copy.suffix} file cannot hold it; convert it to PNG"

    def find(picture: NDArray[np.uint8]) -> tuple[Detections, NDArray[np.uint8]]:
        faces = detector.detect(picture, score_threshold, nms_threshold, longest=longest)
        return faces, draw(picture, faces.boxes.numpy(), faces.scores.numpy(), faces.landmarks.numpy())

    try:
        # A bar for the photos up to the next video, and one for its frames.
        for photos, group in groupby(sources, is_photo):
            here = list(group)
            if photos:
                messages += filter(None, in_parallel(look, here, "detecting", detector.callers))
                continue
            for source in here:
                try:
                    video = open_video(source, frames)
                except InputError as error:
                    messages.append(str(error))
                    continue
                in_video, interruption = _detect_video(find, video, copies[source])
                if in_video.frames:
                    found[source] = in_video
                if interruption is None and video.lacks(len(in_video.frames)):
                    messages.append(f"{source}: ends after {len(in_video.frames)} of {video.count} frames")
                if interruption is not None and isinstance(source, Path):
                    raise interruption
    except BaseException:
        if found:
            _write_results(_by_name(found, sources), copies, out)
        raise
    result = _by_name(found, sources)
    _write_results(result, copies, out)
    return result, messages


def _by_name(found: Mapping[Source, Detections | VideoDetections], sources: Sequence[Source]) -> Found:
    """What was found, in the order of the sources."""
    return {str(source): found[source] for source in sources if source in found}


def _write_picture(picture: NDArray[np.uint8], copy: Path) -> bool:
    """Whether a file of this kind can hold the picture; it is written then."""
    try:
        written, content = cv2.imencode(copy.suffix, picture)
    except cv2.error:
        written = False
    if written:
        with _result_file(copy) as part:
            part.write_bytes(content.tobytes())
    return written


def _write_results(found: Found, copies: Mapping[Source, Path], out: Path) -> None:
    names = {str(source): copy.name for source, copy in copies.items()}
    facts = {source: {"copy": names.get(source), **_plain(each)} for source, each in found.items()}
    with _result_file(out / _JSON) as part:
        part.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    with _result_file(out / _CSV) as part:
        # Names of files need not be UTF-8.
        part.write_text(_as_csv(found), "utf-8", "surrogateescape", newline="")


def _detect_video(find: Find, video: Video, copy: Path) -> tuple[VideoDetections, KeyboardInterrupt | None]:
    """What is in a video, and the Ctrl-C that has stopped it: the way to stop a camera."""
    found: list[Detections] = []
    writer = None
    interruption = None
    with _result_file(copy) as part:
        try:
            for frame in with_progress(video, f"detecting in {video.source}"):
                faces, picture = find(frame)
                if writer is None:
                    size = (picture.shape[1], picture.shape[0])
                    writer = cv2.VideoWriter(str(part), cv2.VideoWriter.fourcc(*"mp4v"), video.fps, size)
                    if not writer.isOpened():
                        raise InputError(f"{copy}: cannot be written as a video; choose another --out")
                writer.write(picture)
                found.append(faces)
        except KeyboardInterrupt as error:
            interruption = error
        finally:
            if writer is not None:
                writer.release()
    return VideoDetections(video.fps, found), interruption


def _plain(found: Detections | VideoDetections) -> dict[str, Any]:
    if isinstance(found, VideoDetections):
        return {"frames_per_second": found.frames_per_second, "frames": [_plain(faces) for faces in found.frames]}
    return {key: value.tolist() for key, value in found._asdict().items()}


def _as_csv(found: Found) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_CSV_HEADER)
    for source, each in found.items():
        frames = enumerate(each.frames) if isinstance(each, VideoDetections) else [("", each)]
        for number, faces in frames:
            for box, score, points in zip(*(values.tolist() for values in faces), strict=True):
                pixels = [f"{value:.2f}" for value in (*box, *chain(*points))]
                writer.writerow([source, number, *pixels[:4], f"{score:.4f}", *pixels[4:]])
    return text.getvalue()


@contextmanager
def _result_file(path: Path) -> Iterator[Path]:
    try:
        note_result(path.parent, path.name)
        with whole_file(path) as part:
            yield part
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def _copies(sources: Sequence[Source], out: Path, earlier: Set[str]) -> dict[Source, Path]:
    """Where the annotated copy of each source goes; the results of earlier runs may be overwritten."""
    files = [source for source in sources if isinstance(source, Path)]
    names = Counter(file.name for file in files)
    used = {file.resolve() for file in files}
    taken = {path.name.lower() for path in out.iterdir() if path.name not in earlier or path.resolve() in used}
    copies = {}
    for source in sources:
        path = source if isinstance(source, Path) else Path(f"camera_{source}")
        suffix = (path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".png") if is_photo(source) else ".mp4"
        copies[source] = out / _copy_name(path, suffix, names[path.name] > 1, taken)
    return copies


def _copy_name(path: Path, suffix: str, shared: bool, taken: set[str]) -> str:
    """Name of the annotated copy: the source's own, with folder and number where it takes them to be its own.

    Args:
        path: The source.
        suffix: Of the copy.
        shared: Whether another source has the same name.
        taken: Names in use, in lower case since not every file system tells ``A.jpg`` from ``a.jpg``; the new one is
            added.
    """
    stem = f"{path.absolute().parent.name}_{path.stem}" if shared else path.stem
    stem = os.fsdecode(os.fsencode(stem)[:240])  # file systems take 255 bytes, number and suffix included
    names = (f"{stem}{number}{suffix}" for number in chain([""], (f"_{n}" for n in count(2))))
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return name
