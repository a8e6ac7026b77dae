"""How fast ONNX models are on this machine's CPU, compared fairly.

Timings on a shared machine jump by factors within seconds, so the models take turns (A B C, B C A, …) and are
compared within each round: what disturbs one disturbs the others. The ratio that is reported is the median over the
rounds, with an interval that says whether it can be told from 1.
"""

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table
from scipy.stats import quantile_test

from retinaface.cpus import cpu_flags, cpu_name, physical_cores, usable_cpus
from retinaface.delivery.session import open_session
from retinaface.errors import InputError, one_line
from retinaface.progress import with_progress

INT8_FLAGS = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "neon", "asimd", "asimddp", "i8mm")
PACKAGES = ("torch", "lightning", "onnxruntime", "torchao")

_INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


@dataclass(frozen=True)
class Timing:
    """What the rounds say about one model; the first model of a benchmark is the baseline.

    Attributes:
        model: the ONNX file.
        size: side of the square input in pixels.
        batch: photos per call.
        threads: threads that ONNX Runtime computes with.
        rounds: calls timed.
        median_ms: median time of a call in milliseconds.
        p10_ms: 10th percentile of the time.
        p90_ms: 90th percentile of the time.
        ratio: median over rounds of baseline time / this model's time: 2 means twice as fast as the baseline.
        ratio_p10: 10th percentile of the ratio.
        ratio_p90: 90th percentile of the ratio.
        ratio_low: lower end of the 95 % confidence interval of ``ratio``; None with fewer than 6 rounds.
        ratio_high: upper end of that interval; None with fewer than 6 rounds.
        differs: whether that interval excludes 1, so that the difference exceeds the noise.
    """

    model: str
    size: int
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


def benchmark(
    models: Sequence[Path],
    size: int = 640,
    threads: int | None = None,
    warmup: int = 10,
    rounds: int = 100,
    batch: int = 1,
) -> list[Timing]:
    """Time ONNX models against each other in ONNX Runtime on the CPU.

    Shows a progress bar on standard error where that is a terminal.

    Args:
        models: ONNX files with one image input ``(batch, 3, height, width)`` of float32, float16 or uint8; the first
            is the baseline.
        size: height and width of the input in pixels.
        threads: threads to compute with; None takes every physical core that this process may use.
        warmup: rounds run before the timing starts.
        rounds: rounds timed.
        batch: photos per call.

    Returns:
        One timing per model, in the order given.

    Raises:
        InputError: no model is given, a number is too small, a file is missing or is no ONNX model, or a model
            does not take this input.
    """
    if not models:
        raise InputError("benchmark: no model given; name a baseline ONNX file and candidates to compare with it")
    threads = physical_cores() if threads is None else threads
    least = {"size": 1, "threads": 1, "warmup": 0, "rounds": 1, "batch": 1}
    given = {"size": size, "threads": threads, "warmup": warmup, "rounds": rounds, "batch": batch}
    for name, value in given.items():
        if value < least[name]:
            raise InputError(f"benchmark: {name} must be at least {least[name]}, got {value}")
    calls = [_prepare(Path(model), size, batch, threads) for model in models]
    times = _interleaved_times(calls, warmup, rounds)
    return [
        _summarise(str(model), size, batch, threads, times[:, 0], times[:, column])
        for column, model in enumerate(models)
    ]


@dataclass(frozen=True)
class _Call:
    """A session with the input to run it on."""

    session: ort.InferenceSession
    feed: dict[str, NDArray[Any]]

    def milliseconds(self) -> float:
        start = time.perf_counter()
        self.session.run(None, self.feed)
        return (time.perf_counter() - start) * 1000


def _prepare(model: Path, size: int, batch: int, threads: int) -> _Call:
    """Open a model, make its input and run it once."""
    if not model.is_file():
        raise InputError(f"{model}: no such file; expected an ONNX model")
    # Threads that one session leaves waiting in a busy loop take the cores from the next: three equal models took
    # 28 ms each in turns, but 15 ms alone, and 15 ms in turns with this option.
    session = open_session(model, threads, {"session.force_spinning_stop": "1"})
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _INPUT_TYPES:
        found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        raise InputError(f"{model}: expected one image input (batch, 3, height, width), found {found or 'none'}")
    shape = (batch, 3, size, size)
    fixed = inputs[0].shape
    if any(isinstance(dim, int) and dim != wanted for dim, wanted in zip(fixed, shape, strict=True)):
        raise InputError(f"{model}: takes inputs of {fixed} only, not {list(shape)}; choose a matching size and batch")
    call = _Call(session, {inputs[0].name: _noise(shape, _INPUT_TYPES[inputs[0].type])})
    try:
        call.milliseconds()
    except Exception as error:
        raise InputError(f"{model}: fails on an input of {list(shape)}: {one_line(error)}") from None
    return call


def _noise(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """Make an input with the spread of a photo whose mean was subtracted (uint8: of a photo), always the same."""
    random = np.random.default_rng(0)
    if dtype is np.uint8:
        return random.integers(0, 256, shape, np.uint8)
    return (random.standard_normal(shape, np.float32) * 50).astype(dtype)


def _interleaved_times(calls: Sequence[_Call], warmup: int, rounds: int) -> NDArray[np.float64]:
    """Run the calls in turn.

    Returns:
        ``(rounds, models)`` milliseconds.
    """
    times = np.empty((warmup + rounds, len(calls)))
    for number in with_progress(range(warmup + rounds), f"timing {len(calls)} models"):
        # Whoever comes first in a round runs on other caches than the rest: everyone is first equally often.
        for position in range(len(calls)):
            column = (number + position) % len(calls)
            times[number, column] = calls[column].milliseconds()
    return times[warmup:]


def _summarise(
    model: str, size: int, batch: int, threads: int, baseline: NDArray[np.float64], times: NDArray[np.float64]
) -> Timing:
    ratios = baseline / times
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    ratio_p10, ratio, ratio_p90 = np.percentile(ratios, [10, 50, 90])
    # Distribution-free (from the ranks of the ratios), as timings are anything but normal; NaN with too few rounds.
    interval = quantile_test(ratios, q=1, p=0.5).confidence_interval(confidence_level=0.95)
    known = bool(np.isfinite([interval.low, interval.high]).all())
    return Timing(
        model=model,
        size=size,
        batch=batch,
        threads=threads,
        rounds=len(times),
        median_ms=float(median),
        p10_ms=float(p10),
        p90_ms=float(p90),
        ratio=float(ratio),
        ratio_p10=float(ratio_p10),
        ratio_p90=float(ratio_p90),
        ratio_low=float(interval.low) if known else None,
        ratio_high=float(interval.high) if known else None,
        differs=known and not interval.low <= 1 <= interval.high,
    )


def benchmark_table(timings: Sequence[Timing]) -> Table:
    """Lay timings out for the terminal.

    Args:
        timings: what :func:`benchmark` returned; the first is the baseline.

    Returns:
        A table with a row per model; the ratio is marked where it cannot be told from 1.
    """
    first = timings[0]
    table = Table(
        title=f"{first.batch}x3x{first.size}x{first.size}, {first.threads} threads, {first.rounds} interleaved rounds"
    )
    table.add_column("model", overflow="fold")
    for heading in ("median ms", "p10-p90 ms", "speed-up", "p10-p90", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, timing in enumerate(timings):
        table.add_row(
            escape(timing.model),
            f"{timing.median_ms:.2f}",
            f"{timing.p10_ms:.2f}-{timing.p90_ms:.2f}",
            f"{timing.ratio:.2f}x",
            f"{timing.ratio_p10:.2f}-{timing.ratio_p90:.2f}",
            "baseline" if index == 0 else _verdict(timing),
        )
    return table


def _verdict(timing: Timing) -> str:
    if not timing.differs:
        return "within noise"
    return "faster" if timing.ratio > 1 else "slower"


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
        "threads": len(usable_cpus()),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
