"""Structured pruning: channels are removed from the tensors, not zeroed."""

import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
import torch_pruning as tp
from torch import nn

from retinaface.compression.channel_groups import (
    ChannelGroup,
    Gradients,
    Importance,
    example_input,
    find_groups,
    groups_matching,
    heads,
)
from retinaface.errors import InputError
from retinaface.model.network import RetinaFace

# A plan is what pruning removed, in order: the convolution that stands for a group, and indices of its output channels.
# Plain values, so that a checkpoint can hold it.
Plan = list[tuple[str, list[int]]]

Ranking = Literal["local", "global", "isomorphic"]

# Group name to AP that is lost by ratio of its channels.
Losses = Mapping[str, Mapping[float, float]]

# How far from its target, relative to it, a search may end; and where it stops looking for something closer.
_TOLERANCE = 0.05
_CLOSE = 0.01
_CLOSE_IN_TIME = 0.02  # timings are no more exact than that
# Of the plans that came nearest to a speed: how many are timed again, how often, and how often it is searched anew
# because none of them is near any more.
_FINALISTS, _RETIMINGS, _SEARCHES = 3, 2, 3
_PRECISION = 2**-12  # of the ratio: finer than the channels of any layer


@dataclass(frozen=True)
class PruningTarget:
    """How small or fast the network has to become: exactly one of these.

    Attributes:
        macs: Share of the multiply-accumulate operations that is left, 0 to 1.
        params: Share of the parameters that is left, 0 to 1.
        speedup: How many times as fast it has to run, above 1.
    """

    macs: float | None = None
    params: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise InputError(
                f"pruning: target has {', '.join(given) or 'nothing'}; expected exactly one of macs, params and speedup"
            )
        if not 0 < self.share < 1:
            raise InputError(
                f"pruning: target is {given}; expected the share of macs or params that is left, between 0 and 1, or a "
                "speedup above 1"
            )

    @property
    def share(self) -> float:
        """Share of the cost (operations, parameters or time) that is to be left."""
        return next(each for each in (self.macs, self.params, self.speedup and 1 / self.speedup) if each is not None)


@dataclass(frozen=True)
class PruningSettings:
    """How much is removed, and from where.

    Attributes:
        ratio: Share of the channels to remove, 0 to 1; None without a ``target`` is 0.4.
        target: How small or fast the network has to become; the ratio is searched for.
        importance: How channels are scored; see :func:`retinaface.compression.channel_groups.find_groups`.
        ranking: Against which others a channel is ranked: those of its layer (``local``: every layer loses ``ratio``),
            of the whole network (``global``), or of all layers that are built alike (``isomorphic``, arXiv:2407.04616).
        ratios: Ratios of their own for some modules, with all below them; neither ``target`` nor the ranking moves
            these. Names as in ``keep``; of two that mean the same layer the later one counts.
        keep: Modules, with all below them, that lose none of their output channels.
        round_to: Channel counts are rounded down to a multiple of this, which vector units want; narrow layers may lose
            more than ``ratio`` by it. With ``sensitivity`` they are rounded up.
        min_channels: No layer is left with fewer channels than this.
        max_ratio: No layer loses a larger share than this.
        sensitivity: File of ``python -m retinaface sensitivity``: every layer loses as much as it can for one and the
            same loss of AP (as arXiv:1608.08710 chooses by hand), which ``target`` decides; ``ranking`` is not used.
    """

    ratio: float | None = None
    target: PruningTarget | None = None
    importance: Importance = "l1"
    ranking: Ranking = "local"
    ratios: Mapping[str, float] = field(default_factory=dict)
    keep: Sequence[str] = ()
    round_to: int = 8
    min_channels: int = 1
    max_ratio: float = 0.8
    sensitivity: str | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.target is not None:
            raise InputError("pruning: ratio and target are both given, and each says how much goes; give one")
        given = self.ratios if self.ratio is None else {"ratio": self.ratio, **self.ratios}
        for name, value in given.items():
            if not 0 <= value < 1:
                raise InputError(f"pruning: {name} is {value}; expected a share of the channels, from 0 up to below 1")
        if self.round_to < 1:
            raise InputError(f"pruning: round_to is {self.round_to}; expected 1 or more (8 and 16 suit CPUs)")
        if self.min_channels < 1:
            raise InputError(f"pruning: min_channels is {self.min_channels}; expected 1 or more")
        if not 0 < self.max_ratio < 1:
            raise InputError(
                f"pruning: max_ratio is {self.max_ratio}; expected a share of the channels between 0 and 1"
            )
        for name, value in given.items():
            if value > self.max_ratio:
                raise InputError(f"pruning: {name} is {value}, above max_ratio, which is {self.max_ratio}; change one")
        for name, choices in (("importance", get_args(Importance)), ("ranking", get_args(Ranking))):
            if getattr(self, name) not in choices:
                raise InputError(f"pruning: {name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.sensitivity is not None and self.target is None:
            raise InputError("pruning: sensitivity says where to remove, not how much; give a target with it")

    @property
    def share(self) -> float:
        """Share of the channels to remove where there is no target."""
        return 0.4 if self.ratio is None else self.ratio


def make_plan(
    network: RetinaFace,
    settings: PruningSettings,
    gradients: Gradients | None = None,
    measure_speedup: Callable[[RetinaFace], float] | None = None,
    size: int = 640,
) -> Plan:
    """Chooses the least important channels.

    Args:
        network: On the CPU; left as it was. The outputs of the heads are never touched.
        settings: How much, and from where.
        gradients: For ``importance: taylor``; see :func:`retinaface.compression.channel_groups.loss_gradients`.
        measure_speedup: For ``target: {speedup: ...}``: how many times as fast as ``network`` a pruned one runs.
        size: For ``target: {macs: ...}``: side of the picture in pixels.

    Returns:
        The plan, for :func:`apply_plan`.

    Raises:
        InputError: A setting names a module that the network does not have or that has no channels to lose, the
            sensitivity file does not fit, or the target cannot be reached.
    """
    groups = find_groups(network, settings.importance, settings.keep, gradients)
    fixed = {
        name: ratio
        for pattern, ratio in settings.ratios.items()
        for name in groups_matching(network, groups, pattern, "pruning: ratios")
    }
    free = [group for group in groups if group.name not in fixed]
    losses = None if settings.sensitivity is None else _losses_of(groups, settings)

    def plan_at(strength: float) -> Plan:
        return _plan(groups, _ratios(free, settings.ranking, strength, losses) | fixed, settings)

    if settings.target is None:
        return plan_at(settings.share)
    cost = _cost_meter(network, settings.target, measure_speedup, size)
    if losses is None:
        bounds = 0.0, 1.0
    else:  # from nothing, by way of all that costs no AP, to what costs the largest loss that was measured
        bounds = -1.0, max([0.0, *(loss for points in losses.values() for loss in points.values())])
    return _search(network, groups, plan_at, cost, settings.target, bounds)


def _ratios(
    groups: Sequence[ChannelGroup], ranking: Ranking, strength: float, losses: Losses | None
) -> dict[str, float]:
    """Ratio of each group, at a share of all channels or, with losses, at a loss of AP that each may cost.

    Some channels may cost nothing; from -1 to 0 the strength says which share of those goes.
    """
    if losses is not None:
        part = 1 + min(strength, 0.0)
        return {group.name: part * bearable_ratio(losses[group.name], max(strength, 0.0)) for group in groups}
    if ranking == "local":
        return {group.name: strength for group in groups}
    scopes: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        scopes.setdefault(group.kind if ranking == "isomorphic" else "all", []).append(group)
    return {group.name: ratio for scope in scopes.values() for group, ratio in _ranked_together(scope, strength)}


def _ranked_together(groups: Sequence[ChannelGroup], share: float) -> list[tuple[ChannelGroup, float]]:
    """Ratio of each group when a share of all their channels goes, the least important ones of all."""
    removed = torch.cat([group.scores for group in groups]).argsort(stable=True)[
        : _removed(sum(g.channels for g in groups), share)
    ]
    owner = torch.repeat_interleave(torch.tensor([group.channels for group in groups]))
    counts = owner[removed].bincount(minlength=len(groups)).tolist()
    return [(group, count / group.channels) for group, count in zip(groups, counts, strict=True)]


def _removed(channels: int, ratio: float) -> int:
    return math.ceil(channels * ratio - 1e-6)  # 0.3 * 10 is a little more than 3


def _plan(groups: Sequence[ChannelGroup], ratios: Mapping[str, float], settings: PruningSettings) -> Plan:
    plan: Plan = []
    for group in groups:
        removed = group.channels - _left(group.channels, ratios[group.name], settings)
        if removed:
            plan.append((group.name, sorted(group.scores.argsort(stable=True)[:removed].tolist())))
    return plan


def _left(channels: int, ratio: float, settings: PruningSettings) -> int:
    """Channels that a layer is left with."""
    removed, unit = _removed(channels, ratio), settings.round_to
    # A file that says what each layer bears is taken at its word: rounded down, 15 of 16 channels would become 8.
    round_off = math.floor if settings.sensitivity is None else math.ceil
    wanted = round_off((channels - removed) / unit) * unit if removed else channels
    least = max(settings.min_channels, channels - math.floor(channels * settings.max_ratio))
    return min(channels, max(wanted, math.ceil(least / unit) * unit))


def _cost_meter(
    network: RetinaFace, target: PruningTarget, measure_speedup: Callable[[RetinaFace], float] | None, size: int
) -> Callable[[RetinaFace], float]:
    """A function that says which share of the network's cost a pruned one has."""
    if target.speedup is not None:
        assert measure_speedup is not None, "a target for the speed needs a way to measure it"
        return lambda pruned: 1 / measure_speedup(pruned)
    kind = 0 if target.params is not None else 1
    whole = count_complexity(network, size)[kind]
    return lambda pruned: count_complexity(pruned, size)[kind] / whole


def _search(
    network: RetinaFace,
    groups: Sequence[ChannelGroup],
    plan_at: Callable[[float], Plan],
    cost: Callable[[RetinaFace], float],
    target: PruningTarget,
    bounds: tuple[float, float],
) -> Plan:
    """Bisects how much is removed until the share of the cost that is left is the target's.

    Raises:
        InputError: Even with all removed that may be, too much is left; or too little with only what must be.
    """
    least, most = bounds
    timed = target.speedup is not None
    tried = _Tried(network, cost, target.share, close=_CLOSE_IN_TIME if timed else _CLOSE)
    smallest = tried.share(plan_at(most))
    if smallest > target.share * (1 + _TOLERANCE):
        raise InputError(
            f"pruning: target {_described(target, target.share)} cannot be reached: with all removed that may be, "
            f"{_described(target, smallest)} is left; set a target that is nearer, a higher max_ratio, a lower "
            "min_channels or round_to, or fewer modules in keep or ratios (with a sensitivity file no layer loses more "
            "than was measured)"
        )
    if (forced := plan_at(least)) and (largest := tried.share(forced)) < target.share * (1 - _TOLERANCE):
        raise InputError(
            f"pruning: target {_described(target, target.share)} cannot be met: with nothing removed but what `ratios` "
            f"says, {_described(target, largest)} is left already; lower those ratios or set a target that is further"
        )
    for _ in range(_SEARCHES if timed else 1):
        fewer, more = tried.bisect(plan_at, least, most, (most - least) * _PRECISION)
        # Layers of equal width lose their next channels all at once: try some of them.
        tried.bisect_steps(_steps_between(groups, fewer, more))
        if timed:  # what came nearest may owe that to the noise
            for each in tried.nearest(_FINALISTS):
                tried.confirm(each)
            plan = min(tried.confirmed, key=tried.distance)
        else:
            plan = tried.nearest()[0]
        if tried.distance(plan) <= tried.close:
            break
    if tried.distance(plan) > _TOLERANCE:
        warnings.warn(
            f"pruning: target {_described(target, target.share)} is missed: {_described(target, tried.share(plan))} is "
            "the nearest that was found; a lower round_to makes smaller steps",
            stacklevel=3,
        )
    return plan


class _Tried:
    """Plans that were tried, and which share of the network's cost each leaves.

    Args:
        network: What the plans are for.
        cost: Share of its cost that a pruned network has.
        wanted: The share that is looked for.
        close: How far from it, relative to it, is near enough to look no further.
    """

    def __init__(self, network: RetinaFace, cost: Callable[[RetinaFace], float], wanted: float, close: float) -> None:
        self.network = network
        self.cost = cost
        self.wanted = wanted
        self.close = close
        self._found: dict[str, tuple[float, Plan]] = {}
        self.confirmed: list[Plan] = []

    def share(self, plan: Plan) -> float:
        """What is left with a plan; rounding makes many plans the same, each is measured once."""
        key = json.dumps(plan)
        if key not in self._found:
            self._found[key] = self._measure(plan), plan
        return self._found[key][0]

    def confirm(self, plan: Plan) -> None:
        """Replaces what was measured by a mean that does not include it, once."""
        if plan not in self.confirmed:
            self.confirmed.append(plan)
            self._found[json.dumps(plan)] = statistics.mean(self._measure(plan) for _ in range(_RETIMINGS)), plan

    def distance(self, plan: Plan) -> float:
        """How far from what is wanted, relative to it."""
        return abs(self.share(plan) / self.wanted - 1)

    def nearest(self, count: int = 1) -> list[Plan]:
        """The plans that came nearest to what is wanted, nearest first."""
        return sorted((plan for _, plan in self._found.values()), key=self.distance)[:count]

    def bisect(self, plan_of: Callable[[float], Plan], low: float, high: float, precision: float) -> tuple[Plan, Plan]:
        """The last plans that leave too much and enough."""
        while high - low > precision and self.distance(self.nearest()[0]) > self.close:
            middle = (low + high) / 2
            low, high = (middle, high) if self.share(plan_of(middle)) > self.wanted else (low, middle)
        return plan_of(low), plan_of(high)

    def bisect_steps(self, steps: Sequence[Plan]) -> None:
        """As :meth:`bisect`, over plans that remove more and more."""
        self.bisect(lambda step: steps[int(step)], 0, len(steps) - 1, 1)

    def _measure(self, plan: Plan) -> float:
        pruned = deepcopy(self.network)
        apply_plan(pruned, plan)
        return self.cost(pruned)


def _steps_between(groups: Sequence[ChannelGroup], fewer: Plan, more: Plan) -> list[Plan]:
    """From one plan to another, one group after the other, the least important channels first."""
    before, after = dict(fewer), dict(more)
    extra = {
        group.name: group.scores[sorted(set(after[group.name]) - set(before.get(group.name, [])))].mean().item()
        for group in groups
        if after.get(group.name) != before.get(group.name)
    }
    steps = [fewer]
    for changed in sorted(extra, key=extra.__getitem__):
        before[changed] = after[changed]
        steps.append([(group.name, before[group.name]) for group in groups if group.name in before])
    return steps


def _described(target: PruningTarget, share: float) -> str:
    if target.speedup is not None:
        return f"{{speedup: {1 / share:.2f}}}"
    return f"{{{'macs' if target.params is None else 'params'}: {share:.3f}}}"


def bearable_ratio(losses: Mapping[float, float], budget: float) -> float:
    """Share of a group's channels that can go before more AP is lost than a budget.

    Args:
        losses: Ratio, above 0, to AP that was lost there; between the measured ratios it is taken to be linear.
        budget: 0 or more.

    Returns:
        0 up to the largest ratio that was measured.
    """
    ratio, loss = 0.0, 0.0
    for next_ratio, next_loss in sorted(losses.items()):
        if next_loss > budget:
            return ratio + (next_ratio - ratio) * (budget - loss) / (next_loss - loss)
        ratio, loss = next_ratio, max(next_loss, 0.0)
    return ratio


def _losses_of(groups: Sequence[ChannelGroup], settings: PruningSettings) -> Losses:
    """Reads the file of the sensitivity command.

    Raises:
        InputError: It cannot be read, or was not made for these groups.
    """
    path = settings.sensitivity
    assert path is not None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        losses = {
            group["name"]: {float(point["ratio"]): float(point["ap_loss"]) for point in group["points"]}
            for group in content["groups"]
        }
        channels = {group["name"]: group["channels"] for group in content["groups"]}
        importance = content["importance"]
        for name, points in losses.items():
            if not points or not all(0 < ratio < 1 and math.isfinite(loss) for ratio, loss in points.items()):
                raise ValueError(f"group {name} has points {points}; expected ratios between 0 and 1, and AP losses")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a file of `python -m retinaface sensitivity` ({type(error).__name__}: {error}); make one "
            "with it, --for pruning"
        ) from error
    if importance != settings.importance:
        warnings.warn(
            f"{path}: measured with importance {importance}, which removes other channels than {settings.importance}",
            stacklevel=3,
        )
    for group in groups:
        if channels.get(group.name) != group.channels:
            raise InputError(
                f"{path}: says nothing about {group.name} with {group.channels} channels, so it is of another network; "
                "measure this one with `python -m retinaface sensitivity`"
            )
    return losses


def apply_plan(network: RetinaFace, plan: Plan) -> None:
    """Removes what a plan says.

    Args:
        network: The network that the plan was made for, on the CPU; changed in place.
        plan: From :func:`make_plan` or a checkpoint.

    Raises:
        InputError: The plan does not fit the network.
    """
    modules = dict(network.named_modules())
    training = network.training
    graph = tp.DependencyGraph().build_dependency(network, example_input())
    for name, indices in plan:
        module = modules.get(name)
        width = module.out_channels if isinstance(module, nn.Conv2d) else 0
        removed = set(indices)
        if module in heads(network):
            problem = "which are the network's outputs"
        elif len(removed) != len(indices) or not removed <= set(range(width)) or len(removed) >= width:
            problem = f"which has {width} here, of which at least one has to stay"
        else:
            problem = ""
        if problem:
            listed = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
            raise InputError(
                f"pruning plan: removes channels [{listed}] of {name!r}, {problem}; the plan belongs to another network"
            )
        prune_channels = graph.get_pruner_of_module(module).prune_out_channels
        graph.get_pruning_group(module, prune_channels, list(indices)).prune()
    network.train(training)  # following the dependencies leaves it in evaluation mode


def count_complexity(network: nn.Module, size: int = 640) -> tuple[int, int]:
    """Counts parameters, and multiply-accumulate operations for one ``size x size`` picture.

    Args:
        network: Any network over ``(1, 3, size, size)`` float input, on the CPU.
        size: Side of the picture in pixels.

    Returns:
        Parameters (without buffers) and MACs of convolutions.
    """
    from torch.utils.flop_counter import FlopCounterMode

    training = network.training
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    network.train(training)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2
