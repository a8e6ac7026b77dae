"""Where the time of a training step goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

OTHER = "other"

# In the order in which they happen.
PARTS = {
    "data": "waiting for the next batch",
    "transfer": "to the device",
    "forward": "of the network that is trained",
    "teacher": "forward of the teacher",
    "loss": "targets and loss, against the teacher too; with waiting for the slowest process",
    "backward": "with the exchange of gradients",
    "optimizer": "with the clipping of gradients and the checks before the step",
    OTHER: "logging, callbacks, the trainer itself",
}


@dataclass(frozen=True)
class StepTimings:
    """Milliseconds of each training step, by part.

    Attributes:
        parts: Name, as in ``PARTS``, to one entry per step; their sum is the step.
        images_per_step: Of all processes together.
    """

    parts: dict[str, list[float]]
    images_per_step: int

    @property
    def steps(self) -> list[float]:
        """The whole steps."""
        return [sum(step) for step in zip(*self.parts.values(), strict=True)]

    @property
    def images_per_second(self) -> float:
        """Over all steps."""
        return self.images_per_step * len(self.steps) * 1e3 / sum(self.steps)

    def share(self, part: str) -> float:
        """Of the whole time, 0 to 1."""
        return sum(self.parts[part]) / sum(self.steps)

    def figures(self) -> dict[str, Any]:
        """As plain values: ``images_per_second``, ``steps``, and median, 10-90 % range and share of each part."""
        return {
            "images_per_second": self.images_per_second,
            "steps": len(self.steps),
            "step": _spread(self.steps),
            "parts": {name: {**_spread(times), "share": self.share(name)} for name, times in self.parts.items()},
        }


def _spread(times: Sequence[float]) -> dict[str, float]:
    low, high = np.percentile(times, [10, 90])
    return {"median_ms": median(times), "p10_ms": float(low), "p90_ms": float(high)}


def step_timings(marks: Sequence[tuple[str | None, float]], warmup: int, images_per_step: int) -> StepTimings:
    """Adds up what belongs to the same part of the same step.

    Args:
        marks: What began, and when in milliseconds, in order of time: a part, or None where a step ends.
        warmup: Steps at the beginning that do not count.
        images_per_step: Of all processes together.

    Returns:
        The timings of the steps that have ended, without parts that never took any time.
    """
    steps: list[dict[str, float]] = []
    step = dict.fromkeys(PARTS, 0.0)
    for (part, start), (following, end) in pairwise(marks):
        step[part or OTHER] += end - start
        if following is None:
            steps.append(step)
            step = dict.fromkeys(PARTS, 0.0)
    counted = steps[warmup:]
    found = {part: [each[part] for each in counted] for part in PARTS}
    return StepTimings({part: times for part, times in found.items() if any(times)}, images_per_step)


def step_table(timings: StepTimings, title: str) -> Table:
    """The parts of a step, for people."""
    table = Table(title=title)
    table.add_column("part")
    for heading in ("ms, median", "10-90 %", "share"):
        table.add_column(heading, justify="right")
    table.add_column("what it is")
    for name, times in timings.parts.items():
        table.add_row(name, *_cells(times), f"{timings.share(name):.1%}", PARTS[name])
    table.add_section()
    table.add_row("step", *_cells(timings.steps), "", f"{timings.images_per_second:.1f} images/s")
    return table


def _cells(times: Sequence[float]) -> tuple[str, str]:
    spread = _spread(times)
    return f"{spread['median_ms']:.1f}", f"{spread['p10_ms']:.1f}-{spread['p90_ms']:.1f}"
