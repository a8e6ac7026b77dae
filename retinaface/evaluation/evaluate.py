"""How well a detector finds the faces of a data root's validation photos."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retinaface.data.annotations import Sample, load_split, read_image
from retinaface.delivery.runtime import Detector, load_detector
from retinaface.evaluation.wider_ap import SUBSETS, Curve, area_under, subset_curves
from retinaface.model.postprocess import Detections
from retinaface.progress import with_progress

# What the public evaluation uses: nearly everything is kept, the score ranks it.
SCORE_THRESHOLD = 0.02
NMS_THRESHOLD = 0.4


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        ap: Average precision at IoU 0.5 with the WIDER FACE protocol for ``all`` (every valid face), ``easy``,
            ``medium`` and ``hard``; None where the photos are not labelled for it or hold no such face.
        curves: Precision and recall of the subsets that have a figure.
        photos: Number of photos.
        faces: Number of valid faces.
        images_per_second: Reading, detection and suppression, one photo at a time.
        runtime: What ran the detector.
    """

    ap: dict[str, float | None]
    curves: dict[str, Curve]
    photos: int
    faces: int
    images_per_second: float
    runtime: str


def evaluate(model: Path, root: Path, threads: int | None = None) -> Evaluation:
    """Evaluates a detector on the validation photos, each at its own size, with a progress bar.

    Args:
        model: ``.pth``, ``.ckpt`` or ``.onnx``.
        root: Data root in WIDER FACE layout.
        threads: Threads of ONNX Runtime; None takes all CPUs that this process may use.

    Returns:
        The figures.

    Raises:
        InputError: The model or the data cannot be read, an image included.
    """
    detector = load_detector(model, threads)
    samples = load_split(root, "val")
    start = time.perf_counter()
    found = detect_all(detector, samples, f"evaluating {model.name}")
    seconds = time.perf_counter() - start
    detections = [np.column_stack([faces.boxes.numpy(), faces.scores.numpy()]) for faces in found]
    boxes = [sample.boxes for sample in samples]
    curves = subset_curves(detections, boxes, [sample.counted for sample in samples])
    areas = {subset: area_under(curve) for subset, curve in curves.items()}
    return Evaluation(
        ap={subset: _known(areas.get(subset, math.nan)) for subset in SUBSETS},
        curves={subset: curve for subset, curve in curves.items() if not math.isnan(areas[subset])},
        photos=len(samples),
        faces=int(sum(sample.counted["all"].sum() for sample in samples)),
        images_per_second=len(samples) / seconds,
        runtime=detector.runtime,
    )


def detect_all(detector: Detector, samples: Sequence[Sample], description: str) -> list[Detections]:
    """Runs a detector over photos, each at its own size, keeping all but the most hopeless detections."""
    return [
        detector.detect(read_image(sample.path), SCORE_THRESHOLD, NMS_THRESHOLD)
        for sample in with_progress(samples, description)
    ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
