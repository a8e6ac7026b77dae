"""How fast training data come: every step from a file to a batch, the loader, and what training waits for them."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, TypeVar

import cv2
import numpy as np
from rich.table import Table

from retinaface.data.annotations import Sample
from retinaface.data.loading import TrainItem, TrainLoader, collate_train
from retinaface.data.transforms import FACE, IGNORED, TrainTransform
from retinaface.progress import with_progress

_T = TypeVar("_T")


@dataclass(frozen=True)
class SampleTimings:
    """Milliseconds per photo, one entry per photo, of each step of one process without workers.

    Attributes:
        decode: ``cv2.imread`` of the file, to compare with.
        read: Reading with the checks of :meth:`retinaface.data.annotations.Sample.read`.
        crop: The random square alone, cut and resized.
        transform: The whole augmentation, crop included.
        collate: Its share of putting a batch together.
    """

    decode: list[float]
    read: list[float]
    crop: list[float]
    transform: list[float]
    collate: list[float]

    @property
    def ratio(self) -> float:
        """Reading and augmentation over ``cv2.imread``, each summed over all photos."""
        return (sum(self.read) + sum(self.transform)) / sum(self.decode)


@dataclass(frozen=True)
class LoaderTiming:
    """One loader.

    Attributes:
        workers: Its processes; 0 loads in the training process.
        images_per_second: Alone, nothing else going on.
        training_images_per_second: While a network is trained with its batches.
        wait_share: Share of the training time spent waiting for the next batch, 0 to 1.
    """

    workers: int
    images_per_second: float
    training_images_per_second: float
    wait_share: float


def time_samples(
    samples: Sequence[Sample], transform: TrainTransform, batch_size: int, photos: int, repeats: int = 3
) -> SampleTimings:
    """Times every step from file to batch, photo by photo, the steps in turns.

    Args:
        samples: Where the photos come from; those used are spread evenly over them.
        transform: The augmentation.
        batch_size: Samples per batch, for ``collate``.
        photos: Number of photos, at most those there are.
        repeats: Passes over these photos, each with another augmentation; the first warms up and does not count.

    Returns:
        ``photos * (repeats - 1)`` timings of each step.

    Raises:
        InputError: A photo cannot be read.
    """
    chosen = [samples[index] for index in np.linspace(0, len(samples) - 1, min(photos, len(samples))).astype(int)]
    crop_options = replace(transform.options, flip=0.0, affine=0.0, colour=0.0, grayscale=0.0, blur=0.0, jpeg=0.0)
    crop_only = TrainTransform(transform.size, crop_options)
    timings = SampleTimings([], [], [], [], [])
    passes = [(number, sample) for number in range(repeats) for sample in chosen]
    items: list[TrainItem] = []
    for seed, (number, sample) in enumerate(with_progress(passes, "timing photos")):
        labels = np.where(sample.counted["all"], FACE, IGNORED)
        _, decode = _timed(cv2.imread, str(sample.path))
        image, read = _timed(sample.read)
        result, whole = _timed(transform, image, sample.boxes, sample.landmarks, labels, seed)
        _, crop = _timed(crop_only, image, sample.boxes, sample.landmarks, labels, seed)
        items.append({**result, "name": sample.name, "skipped": []})
        if number > 0:
            timings.decode.append(decode)
            timings.read.append(read)
            timings.crop.append(crop)
            timings.transform.append(whole)
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        timings.collate.append(_timed(collate_train, batch)[1] / len(batch))
    return timings


def time_loader(
    make_loader: Callable[[int], TrainLoader], workers: int, train_step: Callable[[Any], None], batches: int
) -> LoaderTiming:
    """Times a loader, alone and while a network is trained with it.

    Args:
        make_loader: Makes a loader with a number of workers.
        workers: That number.
        train_step: Trains with one batch, and returns when the device has finished.
        batches: Batches timed, after as many untimed ones as the workers keep ready, and one more; epochs follow each
            other if one is too short.

    Returns:
        The timings.
    """
    loader = make_loader(workers)
    assert loader.batch_size is not None
    images = batches * loader.batch_size

    stream = _endless(loader)
    kept_ready = 1 + workers * (loader.prefetch_factor or 0)
    for _ in range(kept_ready):
        next(stream)
    start = time.perf_counter()
    for _ in with_progress(range(batches), f"loading, {workers} workers"):
        next(stream)
    alone = time.perf_counter() - start

    for _ in range(kept_ready):
        train_step(next(stream))
    waited = 0.0
    start = time.perf_counter()
    for _ in with_progress(range(batches), f"training, {workers} workers"):
        batch, wait = _timed(next, stream)
        waited += wait / 1e3
        train_step(batch)
    training = time.perf_counter() - start
    return LoaderTiming(workers, images / alone, images / training, waited / training)


def sample_table(timings: SampleTimings) -> Table:
    """The steps of one sample, for people."""
    table = Table(title=f"read + augment take {timings.ratio:.2f}x cv2.imread")
    table.add_column("step")
    for heading in ("ms, median", "ms, mean", "images/s"):
        table.add_column(heading, justify="right")
    for name, values in (
        ("cv2.imread, to compare with", timings.decode),
        ("read", timings.read),
        ("augment: crop alone", timings.crop),
        ("augment: everything", timings.transform),
        ("collate", timings.collate),
    ):
        table.add_row(name, f"{median(values):.2f}", f"{fmean(values):.2f}", f"{1e3 / fmean(values):.0f}")
    return table


def loader_table(timings: Sequence[LoaderTiming], title: str) -> Table:
    """Loaders of several numbers of workers, for people."""
    table = Table(title=title)
    for heading in ("workers", "loader alone, images/s", "training, images/s", "waiting for data"):
        table.add_column(heading, justify="right")
    for timing in timings:
        table.add_row(
            str(timing.workers),
            f"{timing.images_per_second:.0f}",
            f"{timing.training_images_per_second:.1f}",
            f"{timing.wait_share:.1%}",
        )
    return table


def _timed(function: Callable[..., _T], *arguments: object) -> tuple[_T, float]:
    """What a function returns, and its milliseconds."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, (time.perf_counter() - start) * 1e3


def _endless(loader: Iterable[_T]) -> Iterator[_T]:
    while True:
        yield from loader
