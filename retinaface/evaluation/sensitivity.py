"""Which layers bear pruning: what each group of channels costs and brings when it alone is pruned."""

import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column, Table
from torch import Tensor
from torch.optim.swa_utils import update_bn

from retinaface.compression.channel_groups import ChannelGroup, Importance, find_groups
from retinaface.compression.pruning import PruningSettings, apply_plan, make_plan
from retinaface.compression.structure import load_float_network
from retinaface.data.annotations import evenly_spread, load_split
from retinaface.delivery.export import export_onnx
from retinaface.delivery.runtime import load_detector
from retinaface.errors import InputError
from retinaface.evaluation.benchmark import benchmark
from retinaface.evaluation.evaluate import average_precision
from retinaface.model.network import RetinaFace, as_input

RATIOS = (0.25, 0.5, 0.75)

_ROUNDS = 20


@dataclass(frozen=True)
class Point:
    """What pruning one group made of the network.

    Attributes:
        ratio: Share of the group's channels that was removed.
        ap: Average precision (all) without any training.
        ap_loss: How much less that is than with all channels.
        speedup: How many times as fast the network became, as FP32 in ONNX Runtime.
    """

    ratio: float
    ap: float
    ap_loss: float
    speedup: float


@dataclass(frozen=True)
class GroupSensitivity:
    """A group of channels and its points.

    Attributes:
        name: The group's first convolution.
        channels: Number of channels before.
        points: One per ratio.
    """

    name: str
    channels: int
    points: list[Point]


@dataclass(frozen=True)
class Sensitivity:
    """All groups of a network.

    Attributes:
        ap: Average precision (all) of the network with all its channels, its statistics estimated anew like those of
            the others.
        photos: Number of photos that it was measured on.
        importance: How channels were scored.
        groups: In the order of the network.
    """

    ap: float
    photos: int
    importance: Importance
    groups: list[GroupSensitivity]


def measure_sensitivity(
    model: Path,
    root: Path,
    limit: int | None = None,
    recalibrate: int = 16,
    importance: Importance = "l1",
    size: int = 640,
    threads: int | None = None,
) -> Sensitivity:
    """Prunes every group of channels by itself, at several ratios, and measures the outcome each time.

    Li et al. (arXiv:1608.08710, section 3.2) call this the sensitivity of a layer. As nothing is trained, the batch
    norms' statistics are estimated anew after the surgery: with the old ones even a layer that bears pruning ruins
    those that follow. So are those of the network that all are compared with, as a few photos give other statistics
    than a whole training. Channels are removed without rounding.

    Args:
        model: Float detector (.pth or .ckpt).
        root: Data root whose validation photos count; its training photos give the statistics.
        limit: Use only this many validation photos, spread over all of them; None uses all.
        recalibrate: Training photos for the statistics; 0 leaves them as they are.
        importance: How channels are scored, all but ``taylor``, which needs training batches.
        size: Side in pixels of the picture for the timing.
        threads: Threads for the timing; None takes every physical core.

    Returns:
        What was measured.

    Raises:
        InputError: The model or the data cannot be read, the model is quantized, or the importance is ``taylor``.
    """
    if importance == "taylor":
        raise InputError("sensitivity: importance taylor needs the gradients of a training; choose another")
    network, _ = load_float_network(model)
    samples = evenly_spread(load_split(root, "val"), limit)
    photos = [as_input(sample.read()) for sample in evenly_spread(load_split(root, "train"), recalibrate)]
    groups = find_groups(network, importance)
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original.onnx"
        export_onnx(_with_statistics_of(deepcopy(network), photos), original)
        whole = average_precision(load_detector(original, many=True), samples, "the whole network")
        found = []
        for number, group in enumerate(groups, start=1):
            title = f"{group.name} ({number} of {len(groups)})"
            files = [Path(folder) / f"{ratio}.onnx" for ratio in RATIOS]
            for ratio, file in zip(RATIOS, files, strict=True):
                export_onnx(_pruned(network, group, ratio, importance, photos), file)
            aps = [average_precision(load_detector(file, many=True), samples, title) for file in files]
            timings = benchmark([original, *files], size, threads, warmup=3, rounds=_ROUNDS)[1:]
            points = [
                Point(ratio, ap, whole - ap, timing.ratio)
                for ratio, ap, timing in zip(RATIOS, aps, timings, strict=True)
            ]
            found.append(GroupSensitivity(group.name, group.channels, points))
    return Sensitivity(whole, len(samples), importance, found)


def _pruned(
    network: RetinaFace, group: ChannelGroup, ratio: float, importance: Importance, photos: Sequence[Tensor]
) -> RetinaFace:
    settings = PruningSettings(
        ratio=0, ratios={group.name: ratio}, importance=importance, round_to=1, max_ratio=max(RATIOS)
    )
    pruned = deepcopy(network)
    apply_plan(pruned, make_plan(network, settings))
    return _with_statistics_of(pruned, photos)


def _with_statistics_of(network: RetinaFace, photos: Sequence[Tensor]) -> RetinaFace:
    """The network itself, with the batch norms' statistics of these photos if there are any."""
    if photos:
        update_bn(photos, network)
    return network.eval()


def sensitivity_table(sensitivity: Sensitivity) -> Table:
    """Lays a sensitivity out for the terminal: the loss of AP, and the speed-up, of every group at every ratio."""
    table = Table(
        Column("group", no_wrap=True),
        Column("channels", justify="right", no_wrap=True),
        title=f"Loss of AP (of {sensitivity.ap:.4f}, {sensitivity.photos} photos) and speed-up, one group pruned",
    )
    for ratio in RATIOS:
        table.add_column(f"-{ratio:.0%}", justify="right", no_wrap=True)
    for group in sensitivity.groups:
        cells = [f"{point.ap_loss:+.3f} {point.speedup:.2f}x" for point in group.points]
        table.add_row(group.name, str(group.channels), *cells)
    return table
