"""How many photos a second a detector gets through, by photos per call and callers at once.

From photos in memory to faces: what comes before the network and after it is part of it. Every setting is timed once a
round, in changing order, as in :mod:`retinaface.evaluation.benchmark`, and the median of the rounds is reported.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from retinaface.data.synthetic_photo import render_photo
from retinaface.delivery.runtime import Detector
from retinaface.errors import InputError
from retinaface.evaluation.benchmark import interleaved_times
from retinaface.evaluation.raw_call import RawCall


@dataclass(frozen=True)
class Throughput:
    """What the rounds say about one setting.

    Attributes:
        runtime: what runs the detector.
        threads: that it computes with.
        batch: photos per call.
        callers: threads that call the detector at once.
        photos: per round, all callers together.
        rounds: timed.
        median: photos per second.
        p10: 10th percentile of photos per second.
        p90: 90th percentile of photos per second.
    """

    runtime: str
    threads: int
    batch: int
    callers: int
    photos: int
    rounds: int
    median: float
    p10: float
    p90: float


def measure_throughput(
    load: Callable[[int], Detector],
    batches: Sequence[int],
    callers: Sequence[int],
    threads: Sequence[int],
    size: int = 640,
    photos: int = 16,
    rounds: int = 10,
) -> list[Throughput]:
    """Times every combination of batch size, callers and threads, with a progress bar.

    Args:
        load: gives the detector with a number of threads.
        batches: photos per call.
        callers: threads that call the detector at once.
        threads: that the runtime computes with.
        size: side of the photos in pixels, 64 or more; they are rendered.
        photos: per setting and round, rounded up to whole calls of every caller.
        rounds: timed, after one that is not.

    Returns:
        One result per combination, in the order of threads, batches and callers.

    Raises:
        InputError: the model cannot be loaded, or runs in torch, whose number of threads is that of the process, and
            several are given.
    """
    detectors = {number: load(number) for number in threads}
    if len(detectors) > 1 and any(detector.runtime == "torch" for detector in detectors.values()):
        raise InputError("threads: torch has one number for the whole process; name one")
    pictures = [render_photo(np.random.default_rng(seed), size).image for seed in range(max(batches))]
    settings = list(product(threads, batches, callers))
    calls = [-(-photos // (batch * count)) for _, batch, count in settings]
    with ThreadPoolExecutor(max(callers)) as pool:
        turns = [
            RawCall(partial(_call_at_once, pool, (detectors[computing], pictures[:batch], each), count))
            for (computing, batch, count), each in zip(settings, calls, strict=True)
        ]
        milliseconds = interleaved_times(turns, 1, rounds, f"timing {len(settings)} settings")
    results = []
    for (computing, batch, count), each, times in zip(settings, calls, milliseconds.T, strict=True):
        total = batch * count * each
        p10, median, p90 = np.percentile(1000 * total / times, [10, 50, 90]).tolist()
        results.append(
            Throughput(detectors[computing].runtime, computing, batch, count, total, rounds, median, p10, p90)
        )
    return results


def _call_at_once(
    pool: ThreadPoolExecutor, task: tuple[Detector, Sequence[NDArray[np.uint8]], int], callers: int
) -> None:
    list(pool.map(_call, [task] * callers))


def _call(task: tuple[Detector, Sequence[NDArray[np.uint8]], int]) -> None:
    """What one caller does."""
    detector, pictures, calls = task
    for _ in range(calls):
        detector.detect_batch(pictures)


def throughput_table(results: Sequence[Throughput], title: str) -> Table:
    """Lays throughputs out for the terminal.

    Args:
        results: what :func:`measure_throughput` returned.
        title: what they are of.

    Returns:
        A row per threads and batch, a column per number of callers: median photos per second, the best one marked.
    """
    callers = list(dict.fromkeys(result.callers for result in results))
    medians = {(result.threads, result.batch, result.callers): result.median for result in results}
    best = max(medians, key=lambda setting: medians[setting])
    table = Table(title=f"{title}, {results[0].runtime}: photos/s, median of {results[0].rounds} rounds; * best")
    for heading in ("threads", "batch", *(f"{count} caller{'s' * (count > 1)}" for count in callers)):
        table.add_column(heading, justify="right")
    for threads, batch in dict.fromkeys((result.threads, result.batch) for result in results):
        settings = [(threads, batch, count) for count in callers]
        cells = [f"{medians[setting]:.1f}{'*' if setting == best else ''}" for setting in settings]
        table.add_row(str(threads), str(batch), *cells)
    return table
