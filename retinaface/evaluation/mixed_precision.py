"""Which blocks of a network stay in float: what INT8 costs and brings for each, and a choice that keeps the accuracy.

Nothing is trained: ranges come from a few photos (:func:`retinaface.compression.calibration.calibrate`), which takes
seconds where quantization-aware training takes hours, and says which blocks bear rounding worst. Speed is measured and
not computed: some blocks run slower in INT8 than in float, and between a block in float and one in INT8 there is a
conversion, so a stage is more than the sum of its blocks.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from rich.table import Column, Table
from torch import Tensor, nn

from retinaface.compression.calibration import CalibrationPictures, CalibrationSettings, calibrate
from retinaface.compression.quantization import (
    FakeQuantizedRetinaFace,
    QuantizationSettings,
    prepare_for_training,
)
from retinaface.compression.structure import load_float_network
from retinaface.data.annotations import Sample, evenly_spread, load_split
from retinaface.delivery.export import export_onnx
from retinaface.delivery.runtime import load_detector
from retinaface.errors import InputError
from retinaface.evaluation.benchmark import benchmark
from retinaface.evaluation.evaluate import average_precision
from retinaface.model.network import RetinaFace, lies_in
from retinaface.progress import SizedIterable

_HEADS = ("class_heads", "box_heads", "landmark_heads")

# Blocks, or None for a network that is wholly in float.
Kept = tuple[str, ...] | None

_CALIBRATION = CalibrationSettings()
_ROUNDS = 60
_TIMED_TOGETHER = 6
_MOST_TRIES = 8
# Share of the time below which two networks count as equally fast.
_SAME_SPEED = 0.01


def blocks(network: RetinaFace) -> list[str]:
    """Parts a network into blocks, each of which may stay in float for itself.

    A block is what has convolutions as its children, such as a depthwise-separable block or the three class heads, or
    a module that computes by a rule of its own, such as a bottleneck, the feature pyramid or a context module. Lists
    and sequences of blocks are not blocks, nor are network and backbone, whose own convolutions are blocks.

    Args:
        network: Pruned or not.

    Returns:
        Names of modules, in the order of the network; every convolution is, or lies in, exactly one of them.
    """
    return list(_blocks_below("", network, {network, network.backbone}))


def _blocks_below(name: str, module: nn.Module, wholes: set[nn.Module]) -> Iterator[str]:
    if not any(isinstance(each, nn.Conv2d) for each in module.modules()):
        return
    is_list = type(module) in (nn.Sequential, nn.ModuleList) and not any(
        isinstance(child, nn.Conv2d) for child in module.children()
    )
    if is_list or module in wholes:
        for child_name, child in module.named_children():
            yield from _blocks_below(f"{name}.{child_name}" if name else child_name, child, wholes)
    else:
        yield name


def units(network: RetinaFace) -> dict[str, tuple[str, ...]]:
    """What is tried in float: every block, all the heads together, and everything that holds several blocks.

    Args:
        network: Pruned or not.

    Returns:
        Name, for ``keep_float``, to names of modules without wildcards.
    """
    names = blocks(network)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        parts = name.split(".")
        for outer in (".".join(parts[:depth]) for depth in range(1, len(parts))):
            if sum(lies_in(each, outer) for each in names) > 1:
                found[outer] = (outer,)
        found[name] = (name,)
    return found | {"*_heads": _HEADS}


def _joined(kept: tuple[str, ...], added: tuple[str, ...]) -> tuple[str, ...]:
    """Both, without what lies in another; the first itself if it holds the other already."""
    new = [name for name in added if not any(lies_in(name, outer) for outer in kept)]
    return (*(name for name in kept if not any(lies_in(name, outer) for outer in new)), *new)


@dataclass(frozen=True)
class Trial:
    """A network with some blocks in float and the rest in INT8.

    Attributes:
        keep_float: The blocks in float; None is the whole network.
        ap: Average precision (all).
        speedup: How many times as fast as the network with every block in INT8, in ONNX Runtime.
        differs: Whether that is more than the noise.
    """

    keep_float: Kept
    ap: float
    speedup: float
    differs: bool


@dataclass(frozen=True)
class MixedPrecision:
    """What each block costs in INT8, and brings.

    Attributes:
        photos: Number of photos that average precision was measured on.
        whole: The network in float.
        int8: The network with every block in INT8.
        units: Each of :func:`units`, left in float alone.
    """

    photos: int
    whole: Trial
    int8: Trial
    units: dict[str, Trial]


@dataclass(frozen=True)
class Choice:
    """What stays in float, and how that was found.

    Attributes:
        chosen: The network that meets the budget.
        whole: The network in float, timed together with it.
        tried: Combinations of blocks, in the order in which they were tried.
        measured: What the blocks alone cost and bring.
    """

    chosen: Trial
    whole: Trial
    tried: list[Trial]
    measured: MixedPrecision

    @property
    def keep_float(self) -> tuple[str, ...]:
        """Names of the modules that stay in float; none if INT8 is best everywhere."""
        return self.chosen.keep_float or ()


class _Meter:
    """Quantizes, exports, evaluates and times networks that differ in what stays in float.

    Args:
        network: Float network.
        samples: Photos for the average precision.
        pictures: Photos for the ranges.
        settings: How it is quantized; ``keep_float`` is not looked at.
        folder: Where the ONNX files go.
        size: Side in pixels of the picture for the timing.
        threads: Threads for the timing; None takes every physical core.
    """

    def __init__(
        self,
        network: RetinaFace,
        samples: Sequence[Sample],
        pictures: SizedIterable[Tensor],
        settings: QuantizationSettings,
        folder: Path,
        size: int,
        threads: int | None,
    ) -> None:
        self.network = network
        self.samples = samples
        self.pictures = pictures
        self.settings = settings
        self.folder = folder
        self.size = size
        self.threads = threads
        self._numbers = count()
        self._files: dict[Kept, Path] = {}
        self._aps: dict[Kept, float] = {}

    def measure(self, candidates: Sequence[Kept], titles: Sequence[str]) -> list[Trial]:
        """Measures some networks, whose files stay for the next time; they and the all-INT8 one are timed in turns."""
        files = [self._file(()), *map(self._file, candidates)]
        for kept, title in zip(((), *candidates), ("all in INT8", *titles), strict=True):
            if kept not in self._aps:
                self._aps[kept] = average_precision(load_detector(self._file(kept), many=True), self.samples, title)
        timings = benchmark(files, self.size, self.threads, warmup=5, rounds=_ROUNDS)[1:]
        return [
            Trial(kept, self._aps[kept], timing.ratio, timing.differs)
            for kept, timing in zip(candidates, timings, strict=True)
        ]

    def forget(self, candidates: Sequence[Kept]) -> None:
        """Deletes files: those of all blocks of a large network together take gigabytes."""
        for kept in candidates:
            self._files.pop(kept).unlink()

    def _file(self, kept: Kept) -> Path:
        if kept not in self._files:
            file = self.folder / f"{next(self._numbers)}.onnx"
            export_onnx(self.network if kept is None else self._quantized(kept), file)
            self._files[kept] = file
        return self._files[kept]

    def _quantized(self, kept: tuple[str, ...]) -> FakeQuantizedRetinaFace:
        quantized = prepare_for_training(self.network, replace(self.settings, keep_float=kept))
        calibrate(quantized, self.pictures, _CALIBRATION)
        return quantized


def measure_mixed_precision(
    model: Path,
    root: Path,
    limit: int | None = None,
    photos: int = 32,
    size: int = 640,
    threads: int | None = None,
) -> MixedPrecision:
    """Leaves every block in float by itself, and every stage, with the rest in INT8, and measures the outcome.

    Args:
        model: Float detector (.pth or .ckpt).
        root: Data root whose validation photos count; its training photos give the ranges.
        limit: Use only this many validation photos, spread over all of them; None uses all.
        photos: Training photos for the ranges.
        size: Side in pixels of the picture for the timing.
        threads: Threads for the timing; None takes every physical core.

    Returns:
        What was measured.

    Raises:
        InputError: The model or the data cannot be read, the model is quantized, or no photo shows a face.
    """
    network, _ = load_float_network(model)
    samples = evenly_spread(load_split(root, "val"), limit)
    pictures = CalibrationPictures(load_split(root, "train"), photos)
    with tempfile.TemporaryDirectory() as folder:
        return _measure_units(_Meter(network, samples, pictures, QuantizationSettings(), Path(folder), size, threads))


def _measure_units(meter: _Meter) -> MixedPrecision:
    if not any(sample.counted["all"].any() for sample in meter.samples):
        raise InputError(
            f"quantization: none of the {len(meter.samples)} photos to measure on shows a face; give more, or others"
        )
    whole, int8 = meter.measure([None, ()], ["in float", "all in INT8"])
    wanted = list(units(meter.network).items())
    found: dict[str, Trial] = {}
    for start in range(0, len(wanted), _TIMED_TOGETHER):
        names, candidates = zip(*wanted[start : start + _TIMED_TOGETHER], strict=True)
        titles = [f"{name} ({start + number} of {len(wanted)})" for number, name in enumerate(names, start=1)]
        found |= zip(names, meter.measure(candidates, titles), strict=True)
        meter.forget(candidates)
    return MixedPrecision(len(meter.samples), whole, int8, found)


def choose_keep_float(
    network: RetinaFace,
    samples: Sequence[Sample],
    pictures: SizedIterable[Tensor],
    budget: float = 0.01,
    settings: QuantizationSettings | None = None,
    size: int = 640,
    threads: int | None = None,
    report: Callable[[Trial], None] = lambda trial: None,
) -> Choice:
    """Chooses what stays in float, so that the network is fast and INT8 without training loses little accuracy.

    First each of :func:`units` is measured alone. Starting from INT8 everywhere, what is faster in float is added,
    best first, as long as the whole gets faster. While too much average precision is lost, what wins most of it back
    per lost time is added. Every combination is measured, in turns with the one before, the network in INT8 and
    the one in float.

    This takes an export, an evaluation and a timing each for the network in float, in INT8, every unit (27 for
    mobilenet0.25, 31 for ResNet-50) and at most 16 combinations.

    Args:
        network: Float network, pruned or not, on the CPU; left as it was.
        samples: Photos that average precision is measured on.
        pictures: Photos that the ranges come from, ``(B, 3, H, W)`` float32 from
            :func:`retinaface.model.network.normalize` each.
        budget: Largest loss of average precision (all) against the float network.
        settings: How the rest is quantized, for ONNX Runtime; ``keep_float`` is not looked at.
        size: Side in pixels of the picture for the timing.
        threads: Threads for the timing; None takes every physical core.
        report: Is told of each combination.

    Returns:
        What stays in float, and what was tried.

    Raises:
        InputError: No combination meets the budget, or none that does is faster than the network in float; no photo
            shows a face; or the settings are for another runtime, which would have to be timed itself.
    """
    settings = settings or QuantizationSettings()
    if settings.backend != "onnxruntime":
        raise InputError(
            f"quantization: what stays in float is chosen by timings in ONNX Runtime, which say nothing about "
            f"{settings.backend}; name the modules in keep_float"
        )
    with tempfile.TemporaryDirectory() as folder:
        meter = _Meter(network, samples, pictures, settings, Path(folder), size, threads)
        search = _Search(meter, _measure_units(meter), budget, report)
        search.add_what_is_faster_in_float()
        search.require_faster_than_float("deliver the float network")  # what is added for accuracy makes it slower
        search.add_what_wins_back_accuracy()
        search.require_within_budget()
        search.require_faster_than_float("deliver the float network, or allow a larger loss of average precision")
    return Choice(search.current, search.whole, search.tried, search.measured)


class _Search:
    """The search of :func:`choose_keep_float`."""

    def __init__(self, meter: _Meter, measured: MixedPrecision, budget: float, report: Callable[[Trial], None]) -> None:
        self.meter = meter
        self.measured = measured
        self.budget = budget
        self.report = report
        self.current = measured.int8
        self.whole = measured.whole
        self.tried: list[Trial] = []

    def add_what_is_faster_in_float(self) -> None:
        faster = [unit for unit in self.measured.units.values() if unit.differs and unit.speedup > 1]
        self._add(sorted(faster, key=lambda unit: -unit.speedup), lambda new, old: new.speedup > old.speedup)

    def add_what_wins_back_accuracy(self) -> None:
        def gain(unit: Trial) -> float:
            return unit.ap - self.measured.int8.ap

        missing = self.whole.ap - self.current.ap - self.budget

        def gain_per_lost_time(unit: Trial) -> float:
            return min(gain(unit), missing) / max(1 / unit.speedup - 1, _SAME_SPEED)

        helpful = [unit for unit in self.measured.units.values() if gain(unit) > 0]
        self._add(
            sorted(helpful, key=gain_per_lost_time, reverse=True), lambda new, old: new.ap > old.ap, self._within_budget
        )

    def _add(
        self,
        wanted: Sequence[Trial],
        is_better: Callable[[Trial, Trial], bool],
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Adds to what stays in float, one after the other, what makes the whole better."""
        most = len(self.tried) + _MOST_TRIES
        for unit in wanted:
            if is_enough() or len(self.tried) == most:
                return
            kept = self.current.keep_float or ()
            joined = _joined(kept, unit.keep_float or ())
            if joined == kept:
                continue
            candidates = (None, kept, joined)
            self.whole, self.current, candidate = self.meter.measure(candidates, [f"trying {', '.join(joined)}"] * 3)
            self.tried.append(candidate)
            self.report(candidate)
            if is_better(candidate, self.current):
                self.current = candidate

    def _within_budget(self) -> bool:
        return self.whole.ap - self.current.ap <= self.budget

    def _in_float(self) -> str:
        return ", ".join(self.current.keep_float or ()) or "nothing"

    def require_within_budget(self) -> None:
        if not self._within_budget():
            raise InputError(
                f"quantization: INT8 without training loses {self.whole.ap - self.current.ap:.3f} of the average "
                f"precision even with {self._in_float()} in float, and the budget is {self.budget:g}; allow more "
                "(training wins back most of what rounding costs), or name the modules in keep_float"
            )

    def require_faster_than_float(self, remedy: str) -> None:
        if self.current.speedup <= self.whole.speedup:
            raise InputError(
                f"quantization: INT8 gains nothing on this machine: with {self._in_float()} in float the network runs "
                f"{self.current.speedup / self.whole.speedup:.2f}x as fast as in float; {remedy}"
            )


def mixed_precision_table(measured: MixedPrecision) -> Table:
    """Lays out for the terminal what each block left in float wins back, and what it does to the speed."""
    table = Table(
        Column("in float", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in ("AP", "against INT8", "speed", "verdict")),
        title=f"Blocks left in float one at a time, the rest in INT8 ({measured.photos} photos)",
    )
    rows = {"nothing": measured.int8, **measured.units, "everything": measured.whole}
    for name, trial in rows.items():
        verdict = "baseline" if trial is measured.int8 else _verdict(trial)
        table.add_row(name, f"{trial.ap:.4f}", f"{trial.ap - measured.int8.ap:+.4f}", f"{trial.speedup:.2f}x", verdict)
    return table


def _verdict(trial: Trial) -> str:
    if not trial.differs:
        return "within noise"
    return "faster" if trial.speedup > 1 else "slower"
