"""Structured pruning: channels are removed from the tensors, not zeroed.

Torch-Pruning's dependency graph (arXiv:2301.12900) finds what must shrink together: the next convolution's inputs,
batch norms, depthwise convolutions, both sides of an addition, the parts of a concatenation.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch_pruning as tp
from torch import nn

from retinaface.errors import InputError
from retinaface.model.network import RetinaFace, matching_modules

# A plan is what pruning removed, in order: name of the module where a group starts, whether by its output channels, and
# the channel indices. Plain values, so that a checkpoint can hold it.
Plan = list[tuple[str, bool, list[int]]]


@dataclass(frozen=True)
class PruningSettings:
    """How much is removed, and from where.

    Attributes:
        ratio: Share of the channels of every layer to remove, 0 to 1.
        round_to: Channel counts are rounded down to a multiple of this, which vector units want; narrow layers may lose
            more than ``ratio`` by it.
        global_ranking: Rank all channels of the network together, so that layers lose more or less than ``ratio``,
            instead of every layer by itself.
        keep: Modules, with all below them, that lose none of their output channels.
        max_ratio: No layer loses a larger share than this.
    """

    ratio: float = 0.4
    round_to: int = 8
    global_ranking: bool = False
    keep: Sequence[str] = field(default=())
    max_ratio: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise InputError(f"pruning: ratio is {self.ratio}; expected a share of the channels, from 0 up to below 1")
        if self.round_to < 1:
            raise InputError(f"pruning: round_to is {self.round_to}; expected 1 or more (8 and 16 suit CPUs)")
        if not 0 < self.max_ratio < 1:
            raise InputError(
                f"pruning: max_ratio is {self.max_ratio}; expected a share of the channels between 0 and 1"
            )


def make_plan(network: RetinaFace, settings: PruningSettings) -> Plan:
    """Chooses the least important channels, by the L1 norm of their weights (arXiv:1608.08710).

    Args:
        network: On the CPU; left as it was. The outputs of the heads are never touched.
        settings: How much, and from where.

    Returns:
        The plan, for :func:`apply_plan`.

    Raises:
        InputError: ``keep`` names a module that the network does not have.
    """
    network = deepcopy(network).requires_grad_(True)  # frozen parameters would silently be left out
    heads = [*network.class_heads, *network.box_heads, *network.landmark_heads]
    pruner = tp.pruner.BasePruner(
        network,
        _example(),
        importance=tp.importance.MagnitudeImportance(p=1),
        global_pruning=settings.global_ranking,
        pruning_ratio=settings.ratio,
        max_pruning_ratio=settings.max_ratio,
        round_to=settings.round_to,
        ignored_layers=[*heads, *_below(network, settings.keep)],
    )
    pruner.step()
    return [(str(name), bool(out), [int(i) for i in indices]) for name, out, indices in pruner.pruning_history()]


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
    graph = tp.DependencyGraph().build_dependency(network, _example())
    for name, is_output, indices in plan:
        module = modules.get(name)
        width = _width(module, is_output)
        outside = [index for index in indices if not 0 <= index < width]
        if outside or not width:
            raise InputError(
                f"pruning plan: removes channel {outside[0] if outside else '-'} of {name!r}, which has {width} here; "
                "the plan belongs to another network"
            )
        pruner = graph.get_pruner_of_module(module)
        prune_channels = pruner.prune_out_channels if is_output else pruner.prune_in_channels
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


def _example() -> torch.Tensor:
    return torch.zeros(1, 3, 64, 64)


def _below(network: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    names = matching_modules(network, patterns, "pruning: keep")
    return [module for name in names for module in network.get_submodule(name).modules()]


def _width(module: nn.Module | None, is_output: bool) -> int:
    if isinstance(module, nn.Conv2d):
        return module.out_channels if is_output else module.in_channels
    return module.num_features if isinstance(module, nn.BatchNorm2d) else 0
