"""Renders data roots with drawn faces, so that everything can be tried and tested without any data set.

The photos come from ``retinaface.data.synthetic_photo``; here they get files and annotations in the layout of WIDER
FACE. Like there, the faces of the validation photos belong to nested subsets:

- easy: at least 50 pixels high, 70 percent visible, not heavily blurred and not in the dark;
- medium: at least 25 pixels high, half visible and not heavily blurred;
- hard: at least 10 pixels high and ``MIN_VISIBLE`` visible.

Smaller faces, and faces hidden further, belong to none.
"""

import io
import json
import multiprocessing
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.io import savemat

from retinaface.cpus import usable_cpus
from retinaface.data.annotations import DIFFICULTIES
from retinaface.data.synthetic_photo import Attributes, render_photo
from retinaface.errors import InputError
from retinaface.progress import with_progress

MARKER = "synthetic.json"
_EVENT = "0--Synthetic"
_RENDERER_VERSION = 2  # raise it when the same seed gives other pictures: existing roots are then rendered anew
_SPLITS = ("train", "val")
_PIXELS_WORTH_A_PROCESS = 600 * 320**2  # a process takes seconds to start; below this many each it saves no time


@dataclass(frozen=True)
class _Settings:
    """What a rendered root was made with; its marker file."""

    train: int
    val: int
    size: int
    seed: int
    version: int = _RENDERER_VERSION


class _Job(NamedTuple):
    """A photo to be rendered into a file."""

    file: Path
    size: int
    seed: tuple[int, int, int]


class _Annotation(NamedTuple):
    """The faces of a photo: ``(N, 4)`` x, y, width, height; ``(N, 5, 2)``; the columns of Attributes; ``(N,)`` each."""

    name: str
    xywh: NDArray[np.int64]
    landmarks: NDArray[np.float32]
    attributes: NDArray[np.int64]
    subsets: dict[str, NDArray[np.bool_]]


def write_synthetic_root(
    root: Path | str, train: int, val: int, size: int = 320, seed: int = 0, processes: int | None = None
) -> Path:
    """Renders a data root in WIDER FACE layout.

    Photos, the official text annotations, RetinaFace labels (with landmarks), and in ``wider_face_split/`` also the
    four ``.mat`` files of the validation photos. A complete root that was made with the same settings is kept. The root
    appears in one step when everything is written, so an interrupted call leaves no half root.

    Args:
        root: The folder to make. An existing one is replaced only if it was rendered too.
        train: Number of training photos, at least 1.
        val: Number of validation photos, at least 1.
        size: Side of the photos in pixels, at least 64.
        seed: Same seed, same files, however many processes.
        processes: Processes that render; by default this one for a few photos, and one per usable CPU for many.

    Returns:
        The root.

    Raises:
        InputError: A number is too small, or the folder holds something that was not rendered.
    """
    root = Path(root)
    settings = _Settings(train, val, size, seed)
    if min(train, val) < 1 or size < 64 or seed < 0:
        raise InputError(f"synthetic photos: expected train >= 1, val >= 1, size >= 64 and seed >= 0, found {settings}")
    if processes is None:
        processes = min(usable_cpus(), max(1, (train + val) * size**2 // _PIXELS_WORTH_A_PROCESS))
    if _is_complete(root, settings):
        return root
    if root.exists() and not (root / MARKER).is_file() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root}: holds something that was not rendered; give another folder for the synthetic photos")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        _write_files(new, settings, processes)
        try:
            if root.exists():
                root.rename(old)
            new.rename(root)
        except OSError:
            if not _is_complete(root, settings):  # otherwise another process was faster, with the same result
                raise
    return root


def subsets_of(
    boxes: NDArray[np.float32], visible: NDArray[np.float32], attributes: NDArray[np.int64]
) -> dict[str, NDArray[np.bool_]]:
    """The difficulty of rendered faces, by the rule at the top of this file.

    Args:
        boxes: ``(N, 4)`` xyxy in pixels.
        visible: ``(N,)``, the share of each face that is visible.
        attributes: ``(N, 6)``, the columns of ``Attributes``.

    Returns:
        ``easy``, ``medium`` and ``hard``, each ``(N,)`` bool; each contains the one before it.
    """
    height = boxes[:, 3] - boxes[:, 1]
    described = Attributes(*attributes.T)
    hard = (height >= 10) & (described.invalid == 0)
    medium = hard & (height >= 25) & (visible >= 0.5) & (described.blur < 2)
    easy = medium & (height >= 50) & (visible >= 0.7) & (described.illumination == 0)
    return {"easy": easy, "medium": medium, "hard": hard}


def _is_complete(root: Path, settings: _Settings) -> bool:
    try:
        return bool(json.loads((root / MARKER).read_text(encoding="utf-8")) == asdict(settings))
    except (OSError, ValueError):
        return False


def _write_files(root: Path, settings: _Settings, processes: int) -> None:
    """Photos, annotations and, last, the marker."""
    jobs = {split: _list_jobs(root, split, number, settings) for number, split in enumerate(_SPLITS)}
    all_jobs = [job for split in _SPLITS for job in jobs[split]]
    for folder in {job.file.parent for job in all_jobs}:
        folder.mkdir(parents=True)
    annotations = _render(all_jobs, processes)
    folder = root / "wider_face_split"
    folder.mkdir()
    _write_text_files(folder, "train", annotations[: settings.train])
    _write_text_files(folder, "val", annotations[settings.train :])
    _write_mat_files(folder, annotations[settings.train :])
    (root / MARKER).write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")


def _list_jobs(root: Path, split: str, number: int, settings: _Settings) -> list[_Job]:
    folder = root / f"WIDER_{split}" / "images" / _EVENT
    return [
        _Job(folder / f"0_Synthetic_{split}_{index:05d}.jpg", settings.size, (settings.seed, number, index))
        for index in range(getattr(settings, split))
    ]


def _render(jobs: Sequence[_Job], processes: int) -> list[_Annotation]:
    """Renders the photos; a photo depends on its job alone, so the number of processes changes nothing."""
    if processes == 1:
        return [_render_file(job) for job in with_progress(jobs, "rendering photos")]
    # Not forked: this process may have threads already, torch's for instance.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker) as pool:
        try:
            rendered = pool.map(_render_file, jobs, chunksize=8)
            return [annotation for _, annotation in zip(with_progress(jobs, "rendering photos"), rendered, strict=True)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that waits for this one
    cv2.setNumThreads(1)


def _render_file(job: _Job) -> _Annotation:
    """Renders a photo into its file."""
    rng = np.random.default_rng(job.seed)
    photo = render_photo(rng, job.size)
    _, content = cv2.imencode(".jpg", photo.image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))])
    job.file.write_bytes(content.tobytes())
    xywh = np.concatenate([photo.boxes[:, :2], photo.boxes[:, 2:] - photo.boxes[:, :2]], axis=1).astype(np.int64)
    subsets = subsets_of(photo.boxes, photo.visible, photo.attributes)
    return _Annotation(job.file.stem, xywh, photo.landmarks, photo.attributes, subsets)


def _write_text_files(folder: Path, split: str, annotations: Sequence[_Annotation]) -> None:
    """The official annotations and the labels with landmarks."""
    official, labels = [], []
    for annotation in annotations:
        path = f"{_EVENT}/{annotation.name}.jpg"
        boxes = [" ".join(map(str, row)) for row in annotation.xywh.tolist()]
        described = [" ".join(map(str, row)) for row in annotation.attributes.tolist()]
        official += [path, str(len(boxes)), *(f"{box} {words}" for box, words in zip(boxes, described, strict=True))]
        if not boxes:
            official.append("0 0 0 0 0 0 0 0 0 0")  # like the official files
        labels.append(f"# {path}")
        for box, points in zip(boxes, annotation.landmarks.tolist(), strict=True):
            labels.append(f"{box} {' '.join(f'{x:.3f} {y:.3f} 0.0' for x, y in points)} 0.0")
    (folder / f"wider_face_{split}_bbx_gt.txt").write_text("\n".join(official) + "\n", encoding="utf-8")
    (folder / f"label_{split}.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")


def _write_mat_files(folder: Path, annotations: Sequence[_Annotation]) -> None:
    """The official ground truth: cells of events, of their photos, of matrices with a row per face."""

    def cells_of_photos(values: Iterator[Any]) -> NDArray[np.object_]:
        return _cells([_cells(list(values))])

    content = {
        "event_list": _cells([_EVENT]),
        "file_list": cells_of_photos(annotation.name for annotation in annotations),
        "face_bbx_list": cells_of_photos(annotation.xywh.astype(np.int32) for annotation in annotations),
    }
    for column, attribute in enumerate(Attributes._fields):
        content[f"{attribute}_label_list"] = cells_of_photos(
            annotation.attributes[:, column, None].astype(np.uint8) for annotation in annotations
        )
    _write_mat(folder / "wider_face_val.mat", content)
    for name in DIFFICULTIES:
        counted = cells_of_photos(
            (np.flatnonzero(annotation.subsets[name])[:, None] + 1).astype(np.uint16) for annotation in annotations
        )
        _write_mat(folder / f"wider_{name}_val.mat", {**content, "gt_list": counted})


def _write_mat(file: Path, content: dict[str, Any]) -> None:
    """A MATLAB 5 file without the time of writing, which SciPy notes in the text of 116 bytes at the start."""
    buffer = io.BytesIO()
    savemat(buffer, content, do_compression=True)
    file.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:])


def _cells(values: Sequence[Any]) -> NDArray[np.object_]:
    """``(N, 1)``: a MATLAB cell array."""
    cells = np.empty((len(values), 1), dtype=object)
    for index, value in enumerate(values):  # at once, NumPy would look into arrays of equal shape
        cells[index, 0] = value
    return cells
