"""Finds faces in photos: annotated pictures and a JSON file out."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from retinaface.data.annotations import read_image
from retinaface.delivery.runtime import Detector
from retinaface.errors import InputError
from retinaface.model.postprocess import Detections
from retinaface.progress import with_progress

Draw = Callable[[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any]], NDArray[np.uint8]]


def detect_files(
    detector: Detector,
    images: Sequence[Path],
    out: Path,
    draw: Draw,
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
) -> tuple[dict[str, Detections], list[str]]:
    """Detects faces in photos and writes annotated copies and ``detections.json``.

    The JSON is an object from image path, as given, to ``{"boxes": [[x1, y1, x2, y2]], "scores": [], "landmarks":
    [[[x, y] x 5]]}`` in pixels.

    Args:
        detector: What finds them.
        images: Photos.
        out: Folder to write to; made if need be.
        draw: Draws boxes ``(N, 4)``, scores ``(N,)`` and landmarks ``(N, 5, 2)`` on a copy of a picture.
        score_threshold: Faces with a lower score are dropped.
        nms_threshold: Of two boxes with a higher IoU the lower-scored one is dropped.

    Returns:
        Detections by image path, and a message for each photo that could not be read and was skipped.

    Raises:
        InputError: The folder cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a folder ({error.strerror}); choose another --out") from error
    found: dict[str, Detections] = {}
    unreadable = []
    images = list(dict.fromkeys(images))
    names = Counter(path.name for path in images)
    # The photos themselves must not be overwritten, where --out is their own folder.
    taken = {path.name.lower() for path in images if path.resolve().parent == out.resolve()}
    for path in with_progress(images, "detecting"):
        try:
            image = read_image(path)
        except InputError as error:
            unreadable.append(str(error))
            continue
        faces = detector.detect(image, score_threshold, nms_threshold)
        found[str(path)] = faces
        picture = draw(image, faces.boxes.numpy(), faces.scores.numpy(), faces.landmarks.numpy())
        copy = out / _copy_name(path, names[path.name] > 1, taken)
        if not cv2.imwrite(str(copy), picture):
            raise InputError(f"{copy}: cannot be written; choose another --out")
    content = {path: {key: value.tolist() for key, value in faces._asdict().items()} for path, faces in found.items()}
    try:
        (out / "detections.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{out / 'detections.json'}: cannot be written ({error.strerror}); choose another --out"
        ) from error
    return found, unreadable


def _copy_name(path: Path, shared: bool, taken: set[str]) -> str:
    """Name of the annotated copy: the photo's own, with folder and number where it takes them to be its own.

    Args:
        path: The photo.
        shared: Whether another photo has the same name.
        taken: Names in use, in lower case since not every file system tells ``A.jpg`` from ``a.jpg``; the new one is
            added.
    """
    stem = f"{path.absolute().parent.name}_{path.stem}" if shared else path.stem
    suffix = path.suffix if cv2.haveImageWriter(path.name) else ".png"
    names = (f"{stem}{number}{suffix}" for number in chain([""], (f"_{n}" for n in count(2))))
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return name
