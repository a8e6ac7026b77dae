"""How fast models are on this machine's CPU, compared fairly.

Timings on a shared machine jump by factors within seconds, so models and runtimes take turns, in another order each
round, and are compared within each round: what disturbs one disturbs the others. The ratio that is reported is the
median over the rounds, with an interval that says whether it can be told from 1.
"""

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import quantile_test

from retinaface.cpus import cpu_flags, cpu_name, physical_cores, usable_cpus
from retinaface.errors import InputError
from retinaface.evaluation.raw_call import RawCall, Runtime, Size, fits, height_and_width, prepare
from retinaface.progress import with_progress

# Two sessions of one file differ for as long as they live, by where their memory lies, which no number of rounds evens
# out: in 12 trials of 100 rounds by up to 2.7 %.
SAME = 0.03
"""Share of the time below which a difference is none."""

INT8_FLAGS = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "neon", "asimd", "asimddp", "i8mm")
PACKAGES = ("torch", "lightning", "onnxruntime", "openvino", "torchao")


@dataclass(frozen=True)
class Timing:
    """What the rounds say about one model in one runtime, against a baseline.

    Attributes:
        model: the file.
        size: of the input in pixels: the side of a square, or height and width.
        batch: photos per call.
        threads: threads that the runtime computes with.
        rounds: calls timed.
        median_ms: median time of a call in milliseconds.
        p10_ms: 10th percentile of the time.
        p90_ms: 90th percentile of the time.
        ratio: median over rounds of baseline time / this model's time: 2 means twice as fast as the baseline.
        ratio_p10: 10th percentile of the ratio.
        ratio_p90: 90th percentile of the ratio.
        ratio_low: lower end of the 95 % confidence interval of ``ratio``; None with fewer than 6 rounds.
        ratio_high: upper end of that interval; None with fewer than 6 rounds.
        differs: whether that interval excludes 1, and ``ratio`` is further from 1 than ``SAME``, so that the difference
            exceeds the noise.
        runtime: what ran it.
    """

    model: str
    size: Size
    batch: int
    threads: int
    rounds: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    ratio_low: float | None
    ratio_high: float | None
    differs: bool
    runtime: Runtime = "onnxruntime"


@dataclass(frozen=True)
class Failure:
    """A model that a runtime does not run.

    Attributes:
        model: the file.
        runtime: what does not run it.
        reason: what is wrong.
    """

    model: str
    runtime: Runtime
    reason: str


@dataclass(frozen=True, eq=False)
class Rounds:
    """What models in runtimes took, all of them once a round.

    Attributes:
        models: the files.
        entries: who took turns: an index into ``models`` and a runtime each.
        milliseconds: ``(rounds, entries)``.
        size: of the input in pixels: the side of a square, or height and width.
        batch: photos per call.
        threads: threads that each runtime computed with.
        failures: who would have taken a turn, but does not run.
    """

    models: tuple[Path, ...]
    entries: tuple[tuple[int, Runtime], ...]
    milliseconds: NDArray[np.float64]
    size: Size
    batch: int
    threads: int
    failures: tuple[Failure, ...] = ()

    def timings(self) -> list[Timing]:
        """Every entry against the first."""
        return self._against_the_first(range(len(self.entries)))

    def within(self, runtime: Runtime) -> list[Timing]:
        """Every model in one runtime, against the first model in it; without those that did not run there."""
        return self._against_the_first([column for column, (_, name) in enumerate(self.entries) if name == runtime])

    def fastest(self) -> list[Timing]:
        """Every model in the runtime with its smallest median, against the first model in its own."""
        columns: dict[int, list[int]] = {}
        for column, (model, _) in enumerate(self.entries):
            columns.setdefault(model, []).append(column)
        medians = np.median(self.milliseconds, axis=0)
        return self._against_the_first([min(own, key=lambda column: medians[column]) for own in columns.values()])

    def _against_the_first(self, columns: Sequence[int]) -> list[Timing]:
        return [self._summarise(column, columns[0]) for column in columns]

    def _summarise(self, column: int, baseline: int) -> Timing:
        times = self.milliseconds[:, column]
        ratios = self.milliseconds[:, baseline] / times
        p10, median, p90 = np.percentile(times, [10, 50, 90])
        ratio_p10, ratio, ratio_p90 = np.percentile(ratios, [10, 50, 90])
        # Distribution-free (from the ranks of the ratios), as timings are anything but normal; NaN with too few rounds.
        interval = quantile_test(ratios, q=1, p=0.5).confidence_interval(confidence_level=0.95)
        known = bool(np.isfinite([interval.low, interval.high]).all())
        model, runtime = self.entries[column]
        return Timing(
            model=str(self.models[model]),
            size=self.size,
            batch=self.batch,
            threads=self.threads,
            rounds=len(times),
            median_ms=float(median),
            p10_ms=float(p10),
            p90_ms=float(p90),
            ratio=float(ratio),
            ratio_p10=float(ratio_p10),
            ratio_p90=float(ratio_p90),
            ratio_low=float(interval.low) if known else None,
            ratio_high=float(interval.high) if known else None,
            differs=known and not interval.low <= 1 <= interval.high and abs(math.log(ratio)) > math.log1p(SAME),
            runtime=runtime,
        )


def benchmark(
    models: Sequence[Path],
    size: Size = 640,
    threads: int | None = None,
    warmup: int = 10,
    rounds: int = 100,
    batch: int = 1,
) -> list[Timing]:
    """Time ONNX models against each other in ONNX Runtime on the CPU.

    Args:
        models: as for :func:`time_in_turns`; the first is the baseline.
        size: as for :func:`time_in_turns`.
        threads: as for :func:`time_in_turns`.
        warmup: as for :func:`time_in_turns`.
        rounds: as for :func:`time_in_turns`.
        batch: as for :func:`time_in_turns`.

    Returns:
        One timing per model, in the order given.

    Raises:
        InputError: as for :func:`time_in_turns`.
    """
    return time_in_turns(models, ["onnxruntime"], size, threads, warmup, rounds, batch).timings()


def time_in_turns(
    models: Sequence[Path],
    runtimes: Sequence[Runtime],
    size: Size = 640,
    threads: int | None = None,
    warmup: int = 10,
    rounds: int = 100,
    batch: int = 1,
    optional: Sequence[Runtime] = (),
) -> Rounds:
    """Time every model in every runtime that takes its kind of file, on the CPU, all in the same rounds.

    Shows a progress bar on standard error where that is a terminal.

    Args:
        models: ONNX files with one image input, ``(batch, 3, height, width)`` or ``(batch, height, width, 3)``, of
            float32, float16 or uint8, and for torch checkpoints, which run with simulated INT8 if they are quantized.
        runtimes: what runs them, each with its own defaults.
        size: of the input in pixels: the side of a square, or height and width.
        threads: threads to compute with, for torch those of the whole process; None takes every physical core that
            this process may use.
        warmup: rounds run before the timing starts.
        rounds: rounds timed.
        batch: photos per call.
        optional: runtimes that nobody has asked for: what they cannot run is noted as a failure instead of raised.

    Returns:
        The times, in the order of models and, for each, of runtimes.

    Raises:
        InputError: no model is given, a number is too small, a file is missing or cannot be loaded, a model does not
            take this input, a runtime is not installed, or a model and a runtime have no partner.
    """
    if not models:
        raise InputError("benchmark: no model given; name a baseline and candidates to compare with it")
    threads = physical_cores() if threads is None else threads
    least = {"size": 1, "threads": 1, "warmup": 0, "rounds": 1, "batch": 1}
    side = min(height_and_width(size))
    given = {"size": side, "threads": threads, "warmup": warmup, "rounds": rounds, "batch": batch}
    for name, value in given.items():
        if value < least[name]:
            raise InputError(f"benchmark: {name} must be at least {least[name]}, got {value}")
    paths = tuple(map(Path, models))
    calls: dict[tuple[int, Runtime], RawCall] = {}
    failures = []
    for model, runtime in pair_up(paths, runtimes):
        try:
            calls[model, runtime] = prepare(paths[model], runtime, size, batch, threads)
        except InputError as error:
            if runtime not in optional:
                raise
            failures.append(Failure(str(paths[model]), runtime, str(error).removeprefix(f"{paths[model]}: ")))
    times = interleaved_times(list(calls.values()), warmup, rounds, f"timing {len(calls)} models")
    return Rounds(paths, tuple(calls), times, size, batch, threads, tuple(failures))


def pair_up(models: Sequence[Path], runtimes: Sequence[Runtime]) -> list[tuple[int, Runtime]]:
    """Finds out which model runs in which runtime.

    Args:
        models: files.
        runtimes: names; one that is given twice counts once.

    Returns:
        Index of the model and runtime, in the order of models and, for each, of runtimes.

    Raises:
        InputError: a model runs in none of the runtimes, or a runtime takes none of the models.
    """
    entries = [
        (index, runtime)
        for index, model in enumerate(models)
        for runtime in dict.fromkeys(runtimes)
        if fits(model, runtime)
    ]
    for index, model in enumerate(models):
        if index not in {paired for paired, _ in entries}:
            raise InputError(
                f"{model}: {' and '.join(runtimes)} cannot run it; onnxruntime and openvino run .onnx files, "
                "torch runs .ckpt and .pth files"
            )
    for runtime in runtimes:
        if runtime not in {paired for _, paired in entries}:
            kind = "a .ckpt or .pth" if runtime == "torch" else "an .onnx"
            raise InputError(f"runtime {runtime}: none of the models is for it; name {kind} file too, or leave it out")
    return entries


def interleaved_times(calls: Sequence[RawCall], warmup: int, rounds: int, title: str) -> NDArray[np.float64]:
    """Run calls in turn, in an order that is drawn anew each round (the same in every run), with a progress bar.

    Args:
        calls: what takes turns.
        warmup: rounds run before the timing starts.
        rounds: rounds timed.
        title: what the progress bar says.

    Returns:
        ``(rounds, calls)`` milliseconds.
    """
    times = np.empty((warmup + rounds, len(calls)))
    random = np.random.default_rng(0)
    for number in with_progress(range(warmup + rounds), title):
        # What a call finds in the caches depends on who came before it: nobody always follows the same one.
        for column in random.permutation(len(calls)):
            times[number, column] = calls[column].milliseconds()
    return times[warmup:]


def machine_facts() -> dict[str, Any]:
    """Describe the machine and the software, as far as they bear on timings.

    Returns:
        JSON-able: ``cpu`` (name), ``flags`` (those of ``INT8_FLAGS`` that the CPU has, as far as the system tells),
        ``cores`` and ``threads`` (physical and logical CPUs that this process may use), ``os``, ``python`` and a
        version (or None) for each of ``PACKAGES``.
    """
    flags = cpu_flags()
    return {
        "cpu": cpu_name(),
        "flags": [flag for flag in INT8_FLAGS if flag in flags],
        "cores": physical_cores(),
        "threads": usable_cpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
