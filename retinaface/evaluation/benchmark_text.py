"""Benchmarks in words: tables for the terminal, and Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from retinaface.evaluation.benchmark import SAME, Rounds, Timing
from retinaface.evaluation.footprint import Footprint
from retinaface.evaluation.raw_call import Runtime, Size, height_and_width

RUNTIME_NAMES: Mapping[Runtime, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch"}

_TIMING_HEADINGS = ("model", "runtime", "ms", "p10-p90 ms", "ratio", "p10-p90", "verdict")
_FOOTPRINT_HEADINGS = ("model", "runtime", "file MB", "peak memory MB")


def benchmark_table(rounds: Rounds) -> Table:
    """Lays a benchmark out for the terminal.

    Args:
        rounds: of :func:`retinaface.evaluation.benchmark.time_in_turns`; the first entry is the baseline.

    Returns:
        A table with a row per model and runtime; the ratio is marked where it cannot be told from 1.
    """
    return _table(f"{describe_rounds(rounds)} in turns", _TIMING_HEADINGS, _timing_rows(rounds))


def footprint_table(footprints: Sequence[Footprint], title: str) -> Table:
    """Lays footprints out for the terminal, a row each."""
    return _table(title, _FOOTPRINT_HEADINGS, _footprint_rows(footprints))


def describe_rounds(rounds: Rounds) -> str:
    """Says what was run how often, such as ``1x3x640x640, 2 threads, 100 rounds``."""
    threads = f"{rounds.threads} thread{'s' * (rounds.threads > 1)}"
    return f"{describe_input(rounds.batch, rounds.size)}, {threads}, {len(rounds.milliseconds)} rounds"


def describe_input(batch: int, size: Size) -> str:
    """Such as ``1x3x480x640``."""
    return "x".join(map(str, (batch, 3, *height_and_width(size))))


def describe_failures(rounds: Rounds) -> list[str]:
    """Says of each model that a runtime does not run what is wrong, a sentence each."""
    names = short_names(map(str, rounds.models))
    return [
        f"{names[each.model]} does not run in {RUNTIME_NAMES[each.runtime]}: {each.reason}." for each in rounds.failures
    ]


def describe_fastest(rounds: Rounds) -> list[str]:
    """Compares each model in its fastest runtime with the first model in its own: the choice that a user has.

    Args:
        rounds: of :func:`retinaface.evaluation.benchmark.time_in_turns`.

    Returns:
        A sentence per model from the second on; none where there is one runtime, which the table says all about.
    """
    if len({runtime for _, runtime in rounds.entries}) == 1:
        return []
    first, *others = rounds.fastest()
    names = short_names(map(str, rounds.models))
    times = [
        f"{names[each.model]} in {RUNTIME_NAMES[each.runtime]} {each.median_ms:.2f} ms" for each in (first, *others)
    ]
    return [
        f"Each in its fastest runtime: {times[0]}, {time}: {other.ratio:.2f}x "
        f"({other.ratio_p10:.2f}-{other.ratio_p90:.2f}), {_verdict(other)}."
        for other, time in zip(others, times[1:], strict=True)
    ]


def benchmark_markdown(
    every: Sequence[Rounds], footprints: Sequence[Footprint], footprints_of: str, machine: Mapping[str, Any]
) -> str:
    """Writes a benchmark as Markdown: times, the fastest runtimes, sizes and memory, machine and versions.

    Args:
        every: a benchmark per combination of size, batch and threads.
        footprints: of the same models and runtimes; none where they could not be measured.
        footprints_of: what they were measured with.
        machine: of :func:`retinaface.evaluation.benchmark.machine_facts`.
    """
    lines = [
        "# Benchmark",
        "",
        "Models and runtimes take turns, so that what disturbs one disturbs the others; raw outputs, without "
        "post-processing. Times are medians, ratios the medians over the rounds of the first row's time / this row's, "
        "both with their 10-90 % range. Faster or slower is what a 95 % interval tells from 1 and is "
        f"more than {100 * SAME:.0f} %; all else is noise.",
    ]
    for rounds in every:
        lines += ["", f"## {describe_rounds(rounds)}", "", *_markdown(_TIMING_HEADINGS, _timing_rows(rounds))]
        sentences = describe_failures(rounds) + describe_fastest(rounds)
        lines += [line for sentence in sentences for line in ("", sentence)]
    if footprints:
        lines += ["", "## File size and peak memory", "", f"Memory: {footprints_of}.", ""]
        lines += _markdown(_FOOTPRINT_HEADINGS, _footprint_rows(footprints))
    facts = {name: ", ".join(value) if isinstance(value, list) else value for name, value in machine.items()}
    lines += ["", "## Machine and versions", "", *(f"- {name}: {value}" for name, value in facts.items() if value)]
    return "\n".join([*lines, ""])


def short_names(models: Iterable[str]) -> dict[str, str]:
    """What to call models: file names, with as many of their folders as it takes to tell them apart."""
    parts = {model: Path(model).parts for model in models}
    for depth in range(1, max(map(len, parts.values()), default=1)):
        names = {model: str(Path(*each[-depth:])) for model, each in parts.items()}
        if len({*names.values()}) == len(names):
            return names
    return {model: model for model in parts}


def _timing_rows(rounds: Rounds) -> list[list[str]]:
    timings, names = rounds.timings(), short_names(map(str, rounds.models))
    timed = [
        [
            names[timing.model],
            timing.runtime,
            f"{timing.median_ms:.2f}",
            f"{timing.p10_ms:.2f}-{timing.p90_ms:.2f}",
            f"{timing.ratio:.2f}x",
            f"{timing.ratio_p10:.2f}-{timing.ratio_p90:.2f}",
            "baseline" if index == 0 else _verdict(timing),
        ]
        for index, timing in enumerate(timings)
    ]
    failed = [[names[each.model], each.runtime, *("-",) * 4, "does not run"] for each in rounds.failures]
    return timed + failed


def _footprint_rows(footprints: Sequence[Footprint]) -> list[list[str]]:
    names = short_names(each.model for each in footprints)
    return [
        [names[each.model], each.runtime, f"{each.file_bytes / 1e6:.2f}", f"{each.peak_bytes / 1e6:.1f}"]
        for each in footprints
    ]


def _verdict(timing: Timing) -> str:
    if timing.ratio_low is None:
        return "too few rounds"
    if not timing.differs:
        return "within noise"
    return "faster" if timing.ratio > 1 else "slower"


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, collapse_padding=True, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "runtime") else "right", overflow="fold")
        table.columns[-1].no_wrap = heading != "model"
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rules = ["---" if heading in ("model", "runtime") else "---:" for heading in headings]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rules, *rows)]
