"""How well a detector finds the faces of a data root's validation photos."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.table import Column, Table

from retinaface.data.annotations import Sample, images_folder, read_image, read_split, usable_samples
from retinaface.delivery.runtime import Detector, load_detector
from retinaface.errors import InputError
from retinaface.evaluation.protocols import Protocol, detect_in_views
from retinaface.evaluation.visualize import (
    contact_sheet,
    draw_judgement,
    plot_ap_by_size,
    plot_precision_recall,
)
from retinaface.evaluation.wider_ap import (
    SIZE_CLASSES,
    SUBSETS,
    Curve,
    area_under,
    judge_photo,
    size_curves,
    subset_curves,
    write_predictions,
)
from retinaface.model.postprocess import Detections
from retinaface.progress import in_parallel
from retinaface.whole_file import whole_file

# From this score on a person would be shown a face.
SHOWN_SCORE = 0.5


@dataclass(frozen=True)
class Photo:
    """A photo with its faces and what was found on it.

    Attributes:
        path: The image file.
        name: ``<event>/<file name without suffix>``.
        detections: ``(N, 5)`` float32, xyxy in pixels and score, best first.
        faces: ``(M, 4)`` float32, every annotated face, xyxy in pixels.
        counted: Subset name to ``(M,)`` bool, the faces that count in it.
        upright: Whether it was turned as its EXIF data say.
    """

    path: Path
    name: str
    detections: NDArray[np.float32]
    faces: NDArray[np.float32]
    counted: dict[str, NDArray[np.bool_]]
    upright: bool = False


@dataclass(frozen=True)
class Accuracy:
    """How well faces were found.

    Attributes:
        ap: Average precision at IoU 0.5 with the WIDER FACE protocol for ``all`` (every valid face), ``easy``,
            ``medium`` and ``hard``; None where the photos are not labelled for it or hold no such face.
        ap_by_size: The same for the valid faces of each size class; see
            :func:`retinaface.evaluation.wider_ap.size_curves`.
        curves: Precision and recall of the subsets that have a figure.
    """

    ap: dict[str, float | None]
    ap_by_size: dict[str, float | None]
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        accuracy: How well faces were found.
        landmark_error: Mean distance between found and labelled landmarks; see :func:`landmark_error`; None where no
            found face has any.
        landmark_faces: Number of faces that this is the mean of.
        photos: The photos, with what was found.
        official_photos: Number of photos that the ``.mat`` files list; None without them.
        faces: Number of valid faces.
        images_per_second: Reading, detection and suppression, one photo at a time.
        runtime: What ran the detector.
        protocol: At which sizes the detector saw the photos.
    """

    accuracy: Accuracy
    landmark_error: float | None
    landmark_faces: int
    photos: list[Photo]
    official_photos: int | None
    faces: int
    images_per_second: float
    runtime: str
    protocol: Protocol

    def figures(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        return {
            "ap": self.accuracy.ap,
            "ap_by_size": self.accuracy.ap_by_size,
            "landmark_error": self.landmark_error,
            "landmark_faces": self.landmark_faces,
            "photos": len(self.photos),
            "official_photos": self.official_photos,
            "faces": self.faces,
            "images_per_second": self.images_per_second,
            "runtime": self.runtime,
            "protocol": self.protocol,
        }


def describe_data(figures: Mapping[str, Any]) -> str:
    """Says on what was measured.

    Args:
        figures: Has ``photos``, ``official_photos`` and ``faces``, see :meth:`Evaluation.figures`; ``faces_by`` is
            ``teacher`` where its detections take the place of labels.

    Returns:
        Such as ``67 of 3226 official photos, 1651 faces``; just ``120 photos, 574 faces`` where none is absent.
    """
    photos, official = figures["photos"], figures["official_photos"]
    count = f"{photos}" if official in (None, photos) else f"{photos} of {official} official"
    by_teacher = " of the teacher's" if figures.get("faces_by") == "teacher" else ""
    return f"{count} photos, {figures['faces']} faces{by_teacher}"


def evaluate(
    model: Path, root: Path, protocol: Protocol = "original", load: Callable[[Path], Detector] | None = None
) -> Evaluation:
    """Evaluates a detector on the validation photos, with a progress bar.

    The photos go through one by one: on the CPU a batch of photos of one shape took as long per photo as one alone (2
    photos) or longer (4 and more), in torch and in ONNX Runtime.

    Args:
        model: ``.pth``, ``.ckpt`` or ``.onnx``.
        root: Data root in WIDER FACE layout.
        protocol: At which sizes the detector sees the photos; see :mod:`retinaface.evaluation.protocols`.
        load: Makes a detector of the model; by default :func:`retinaface.delivery.runtime.load_detector`, on the CPU.

    Returns:
        The figures.

    Raises:
        InputError: The model or the data cannot be read, an image included.
    """
    index = read_split(root, "val")
    samples = usable_samples(index, images_folder(root, "val"))
    evaluation = evaluate_on(model, samples, protocol, load)
    return replace(evaluation, official_photos=len(samples) + len(index.absent) if index.official else None)


def evaluate_on(
    model: Path,
    samples: Sequence[Sample],
    protocol: Protocol = "original",
    load: Callable[[Path], Detector] | None = None,
) -> Evaluation:
    """Evaluates a detector on given photos, with a progress bar.

    Args:
        model: ``.pth``, ``.ckpt`` or ``.onnx``.
        samples: The photos, at least one, with their faces.
        protocol: As for :func:`evaluate`.
        load: As for :func:`evaluate`.

    Returns:
        The figures; ``official_photos`` is None.

    Raises:
        InputError: The model or an image cannot be read.
    """
    detector = (load or partial(load_detector, many=True))(model)
    start = time.perf_counter()
    found = detect_all(detector, samples, f"evaluating {model.name}", protocol)
    seconds = time.perf_counter() - start
    photos = [
        Photo(
            sample.path,
            sample.name,
            np.column_stack([faces.boxes.numpy(), faces.scores.numpy()]),
            sample.boxes,
            sample.counted,
            upright=not sample.labelled,
        )
        for sample, faces in zip(samples, found, strict=True)
    ]
    error, landmark_faces = landmark_error(samples, found)
    return Evaluation(
        accuracy=measure_accuracy(photos),
        landmark_error=error,
        landmark_faces=landmark_faces,
        photos=photos,
        official_photos=None,
        faces=int(sum(photo.counted["all"].sum() for photo in photos)),
        images_per_second=len(samples) / seconds,
        runtime=detector.runtime,
        protocol=protocol,
    )


def labelled_by(model: Path, samples: Sequence[Sample]) -> list[Sample]:
    """Takes what a detector finds for the faces, so that others can be measured by how far they agree with it.

    Args:
        model: ``.pth``, ``.ckpt`` or ``.onnx``.
        samples: The photos; labels of theirs are not looked at.

    Returns:
        The same photos, with the faces that the detector finds on them with a score of 0.5 or more.

    Raises:
        InputError: The model or an image cannot be read.
    """
    found = detect_all(load_detector(model, many=True), samples, f"labelling with {model.name}")
    return [_with_faces(sample, faces) for sample, faces in zip(samples, found, strict=True)]


def _with_faces(sample: Sample, detections: Detections) -> Sample:
    shown = (detections.scores >= SHOWN_SCORE).numpy()
    return replace(
        sample,
        boxes=detections.boxes.numpy()[shown],
        landmarks=detections.landmarks.numpy()[shown],
        counted={"all": np.ones(int(shown.sum()), dtype=bool)},
    )


def detect_all(
    detector: Detector, samples: Sequence[Sample], description: str, protocol: Protocol = "original"
) -> list[Detections]:
    """Runs a detector over photos, keeping all but the most hopeless detections, with a progress bar."""

    def look(sample: Sample) -> Detections:
        return detect_in_views(detector, sample.read(), protocol)

    return list(in_parallel(look, samples, description, detector.callers))


def average_precision(detector: Detector, samples: Sequence[Sample], title: str) -> float:
    """Measures average precision over all valid faces, with a progress bar.

    Args:
        detector: What finds the faces.
        samples: Photos, each with the subset ``all``.
        title: What the progress bar calls the detector.

    Returns:
        0-1; NaN without a face.

    Raises:
        InputError: A photo cannot be read.
    """
    found = detect_all(detector, samples, f"evaluating {title}")
    detections = [np.column_stack([faces.boxes.numpy(), faces.scores.numpy()]) for faces in found]
    curves = subset_curves(
        detections, [sample.boxes for sample in samples], [{"all": sample.counted["all"]} for sample in samples]
    )
    return area_under(curves["all"])


def measure_accuracy(photos: Sequence[Photo]) -> Accuracy:
    """Measures average precision, whole and by face size.

    Args:
        photos: The photos, each with the subset ``all``.

    Returns:
        The figures and their curves.
    """
    detections, faces = [photo.detections for photo in photos], [photo.faces for photo in photos]
    curves = subset_curves(detections, faces, [photo.counted for photo in photos])
    areas = {subset: _known(area_under(curve)) for subset, curve in curves.items()}
    sizes = size_curves(detections, faces, [photo.counted["all"] for photo in photos])
    return Accuracy(
        ap={subset: areas.get(subset) for subset in SUBSETS},
        ap_by_size={name: _known(area_under(sizes[name])) if name in sizes else None for name in SIZE_CLASSES},
        curves={subset: curves[subset] for subset in SUBSETS if areas.get(subset) is not None},
    )


def landmark_error(samples: Sequence[Sample], found: Sequence[Detections]) -> tuple[float | None, int]:
    """Measures how far the landmarks of found faces are off.

    A face is found by the best-scored detection that overlaps it by an IoU of 0.5 or more, whatever its score, as for
    the average precision. Its error is the mean distance of its labelled landmarks, divided by the root of its
    annotated box's area: the normalisation of the RetinaFace paper (arXiv:1905.00641, section 4.4), which also holds
    for faces in profile, whose eyes are close together.

    Args:
        samples: The photos.
        found: What was found on each.

    Returns:
        The mean error over the valid faces that were found and have at least one labelled landmark, and their number;
        None and 0 if there are none.
    """
    errors = []
    for sample, detections in zip(samples, found, strict=True):
        rows = np.column_stack([detections.boxes.numpy(), detections.scores.numpy()])
        judgement = judge_photo(rows, sample.boxes, sample.counted["all"])
        faces = judgement.owners[judgement.found]
        distances = np.linalg.norm(detections.landmarks.numpy()[judgement.found] - sample.landmarks[faces], axis=2)
        sides = np.sqrt(np.prod(sample.boxes[faces, 2:] - sample.boxes[faces, :2], axis=1))
        labelled = np.isfinite(distances).any(axis=1)
        errors.append(np.nanmean(distances[labelled], axis=1) / sides[labelled])
    every = np.concatenate([np.empty(0), *errors])
    return (float(every.mean()), len(every)) if len(every) else (None, 0)


def evaluation_tables(evaluations: Mapping[str, Evaluation]) -> list[Table]:
    """Lays evaluations out for the terminal.

    Args:
        evaluations: Model name to evaluation, the teacher first; all of the same photos.

    Returns:
        A table of the subsets with a row per model, and one by face size.
    """
    first = next(iter(evaluations.values()))
    whole = Table(Column("model", overflow="fold"), title=f"AP, {first.protocol}: {describe_data(first.figures())}")
    for heading in (*SUBSETS, "landmark error", "images/s"):
        whole.add_column(heading, justify="right", no_wrap=heading != "landmark error")
    by_size = Table(Column("model", overflow="fold"), title="AP by the face's shorter side in pixels")
    for heading in SIZE_CLASSES:
        by_size.add_column(heading, justify="right", no_wrap=True)
    for name, each in evaluations.items():
        whole.add_row(
            f"{name} ({each.runtime})",
            *(_cell(each.accuracy.ap[subset]) for subset in SUBSETS),
            _cell(each.landmark_error),
            f"{each.images_per_second:.1f}",
        )
        by_size.add_row(name, *(_cell(each.accuracy.ap_by_size[size]) for size in SIZE_CLASSES))
    return [whole, by_size]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def save_results(evaluation: Evaluation, folder: Path) -> None:
    """Writes what was found in the WIDER FACE result format, ``<folder>/<event>/<image>.txt``.

    Raises:
        InputError: The folder cannot be written to, or holds results of other photos, which would count as well.
    """
    there = {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.txt")}
    if others := there - {photo.name for photo in evaluation.photos}:
        raise InputError(f"{folder}: holds results of other photos, such as {min(others)}; choose another --results")
    try:
        for photo in evaluation.photos:
            write_predictions(folder, photo.name, photo.detections[:, :4], photo.detections[:, 4])
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another --results") from error


def save_pictures(
    accuracies: Mapping[str, Accuracy], photos: Sequence[Photo], folder: Path, title: str = ""
) -> dict[str, Path]:
    """Draws what was measured.

    Args:
        accuracies: Model name to its figures, the teacher first; all on the same photos.
        photos: The photos of the last model, whose worst are shown.
        folder: Folder to write to; made if need be.
        title: What to say above the average precision by size, such as the protocol.

    Returns:
        ``precision_recall`` (a panel per subset, a line per model), ``ap_by_size`` and ``worst_photos`` (found faces
        green, false alarms red, missed faces orange) to the PNG file.

    Raises:
        InputError: The folder cannot be written to, or a photo cannot be read.
    """
    files = {name: folder / f"{name}.png" for name in ("precision_recall", "ap_by_size", "worst_photos")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot_precision_recall({name: each.curves for name, each in accuracies.items()}, files["precision_recall"])
        plot_ap_by_size({name: each.ap_by_size for name, each in accuracies.items()}, files["ap_by_size"], title)
        save_worst_photos(photos, files["worst_photos"])
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error
    return files


def save_worst_photos(photos: Sequence[Photo], file: Path) -> None:
    """Writes what :func:`draw_worst_photos` draws as a PNG file."""
    _, encoded = cv2.imencode(".png", draw_worst_photos(photos))
    with whole_file(file) as part:
        part.write_bytes(encoded.tobytes())


def send_to_wandb(project: str, facts: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
    """Sends an evaluation to Weights & Biases, as a run of its own; it stays on the disk where nobody is logged in.

    Args:
        project: The W&B project.
        facts: The figures, which become the run's summary.
        pictures: Name to file.

    Raises:
        InputError: W&B refuses, for want of a connection or the right to the project.
    """
    import wandb  # takes a second, and few evaluations need it

    from retinaface.evaluation.dashboard import start_run

    with start_run(project, job_type="evaluate") as run:
        run.summary.update(dict(facts))
        run.log({f"evaluation/{name}": wandb.Image(str(path)) for name, path in pictures.items()})


def draw_worst_photos(photos: Sequence[Photo], count: int = 12) -> NDArray[np.uint8]:
    """Draws the photos with the most errors, worst first: where the average precision is lost.

    An error is a valid face that no detection with a score of 0.5 or more finds, or such a detection that finds none.

    Args:
        photos: At least one.
        count: Photos to show at most.

    Returns:
        ``(H, W, 3)`` uint8 BGR: a sheet of three columns, see :func:`retinaface.evaluation.visualize.draw_judgement`.
    """
    worst = sorted(photos, key=_errors, reverse=True)[:count]
    return contact_sheet([draw_judged(photo) for photo in worst], columns=3, width=1800)


def draw_judged(photo: Photo) -> NDArray[np.uint8]:
    """Draws what a detector finds on a photo with a score of 0.5 or more, and what it gets wrong.

    Args:
        photo: The photo.

    Returns:
        ``(H, W, 3)`` uint8 BGR of the photo's size, see :func:`retinaface.evaluation.visualize.draw_judgement`.

    Raises:
        InputError: The photo cannot be read.
    """
    return draw_judgement(read_image(photo.path, photo.upright), _shown(photo), photo.faces, photo.counted["all"])


def _errors(photo: Photo) -> int:
    judgement = judge_photo(_shown(photo), photo.faces, photo.counted["all"])
    return int(judgement.false_alarms.sum() + judgement.missed.sum())


def _shown(photo: Photo) -> NDArray[np.float32]:
    return photo.detections[photo.detections[:, 4] >= SHOWN_SCORE]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
