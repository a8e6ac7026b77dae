"""Which channels can only be removed together, and how much each matters.

Torch-Pruning's dependency graph (arXiv:2301.12900) finds what must shrink together: the next convolution's inputs,
batch norms, depthwise convolutions, both sides of an addition, the parts of a concatenation. Its importances average
over the convolutions and batch norms of such a group; they leave out depthwise filters, whose scale the batch norm
behind them undoes anyway.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from retinaface.errors import InputError
from retinaface.model.network import RetinaFace, matching_modules

Importance = Literal["l1", "l2", "taylor", "bn_scale", "lamp", "fpgm", "random"]

# Parameter name to the gradient of the loss.
Gradients = Mapping[str, Tensor]

_IMPORTANCES: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.MagnitudeImportance(p=1),  # arXiv:1608.08710
    "l2": lambda: tp.importance.MagnitudeImportance(p=2),
    "taylor": tp.importance.TaylorImportance,  # arXiv:1906.10771
    "bn_scale": tp.importance.BNScaleImportance,  # arXiv:1708.06519
    "lamp": tp.importance.LAMPImportance,  # arXiv:2010.07611; as l2 where layers are not compared
    "fpgm": tp.importance.FPGMImportance,  # arXiv:1811.00250
    "random": tp.importance.RandomImportance,
}


@dataclass(frozen=True)
class ChannelGroup:
    """Output channels of one or more layers that can only be removed together.

    Attributes:
        name: The first convolution, which stands for the group.
        layers: All modules that lose these output channels, batch norms included.
        scores: ``(C,)`` float32: how much each channel matters, 1 on average (other for ``lamp`` and ``random``).
        kind: What the group is made of; groups of one kind are built alike.
    """

    name: str
    layers: tuple[str, ...]
    scores: Tensor
    kind: str

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.scores)


def find_groups(
    network: RetinaFace,
    importance: Importance = "l1",
    keep: Sequence[str] = (),
    gradients: Gradients | None = None,
) -> list[ChannelGroup]:
    """Finds what can be pruned: everything but the outputs of the heads.

    Args:
        network: On the CPU; left as it was.
        importance: How channels are scored: ``l1`` and ``l2`` by the norm of their weights, ``taylor`` by what the
            loss would lose to first order, ``bn_scale`` by the batch norm's factor, ``lamp`` by the share of what is
            left, ``fpgm`` by the distance to the other filters of the layer.
        keep: Modules, with all below them, that lose none of their output channels.
        gradients: For ``taylor``: of the loss with respect to the parameters, from :func:`loss_gradients`.

    Returns:
        The groups, in the order of the network.

    Raises:
        InputError: ``keep`` names a module that the network does not have.
    """
    network = deepcopy(network).requires_grad_(True)  # frozen parameters would silently be left out
    if importance == "taylor":
        assert gradients is not None, "taylor needs gradients"
        for name, parameter in network.named_parameters():
            parameter.grad = gradients[name]
    score = _IMPORTANCES[importance]()
    graph = tp.DependencyGraph().build_dependency(network, example_input())
    kept = [network.get_submodule(name) for name in modules_below(network, keep, "pruning: keep")]
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())  # so that `random` is the same for the same seed
        for group in graph.get_all_groups(ignored_layers=[*heads(network), *kept]):
            shrinking = {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)}
            layers = {name: module for name, module in network.named_modules() if module in shrinking}
            first = next(name for name, module in layers.items() if isinstance(module, nn.Conv2d))
            group = _group_from(graph, layers[first])
            scores = score(group)
            if scores is not None:  # else nothing in it that this importance looks at
                # A mean of zero, by which scores are divided: nothing in the group matters.
                found[first] = ChannelGroup(first, tuple(layers), scores.nan_to_num(0.0), _kind(graph, group))
    return [found[name] for name, _ in network.named_modules() if name in found]


def _group_from(graph: tp.DependencyGraph, convolution: nn.Conv2d) -> tp.Group:
    """All that shrinks with a convolution's output channels; they number the group's channels."""
    prune_channels = graph.get_pruner_of_module(convolution).prune_out_channels
    return graph.get_pruning_group(convolution, prune_channels, list(range(convolution.out_channels)))


def _kind(graph: tp.DependencyGraph, group: tp.Group) -> str:
    """The same for groups of the same modules in the same order, each losing outputs or inputs alike."""
    return " ".join(
        f"{type(dep.target.module).__name__}:{graph.is_out_channel_pruning_fn(dep.handler):d}" for dep, _ in group
    )


def loss_gradients(network: RetinaFace, losses: Iterable[Tensor]) -> Gradients:
    """Sums the gradients of several losses.

    Args:
        network: What the losses were computed with.
        losses: Scalars, used one after the other.

    Returns:
        Parameter name to gradient, on the CPU.
    """
    names, parameters = zip(*network.named_parameters(), strict=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for loss in losses:
        for so_far, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            so_far += gradient
    return {name: gradient.cpu() for name, gradient in zip(names, total, strict=True)}


def heads(network: RetinaFace) -> list[nn.Module]:
    """The convolutions whose outputs are the network's, so that none of them can go."""
    return [*network.class_heads, *network.box_heads, *network.landmark_heads]


def modules_below(network: nn.Module, patterns: Sequence[str], what: str) -> list[str]:
    """Names of modules and of all modules below them.

    Args:
        network: Where they are.
        patterns: As in :func:`retinaface.model.network.matching_modules`.
        what: The setting they come from, for the error.

    Raises:
        InputError: A pattern matches nothing.
    """
    return [
        f"{name}.{below}" if below else name
        for name in matching_modules(network, patterns, what)
        for below, _ in network.get_submodule(name).named_modules()
    ]


def example_input() -> Tensor:
    """``(1, 3, 64, 64)``: enough to follow the channels through the network."""
    return torch.zeros(1, 3, 64, 64)


def groups_matching(network: nn.Module, groups: Sequence[ChannelGroup], pattern: str, what: str) -> list[str]:
    """Names of the groups with a layer that a pattern means.

    Args:
        network: The network of the groups.
        groups: Where to look.
        pattern: As in :func:`retinaface.model.network.matching_modules`; all below counts.
        what: The setting it comes from, for the error.

    Raises:
        InputError: The pattern matches no module, or none that can lose channels.
    """
    wanted = set(modules_below(network, [pattern], what))
    found = [group.name for group in groups if wanted.intersection(group.layers)]
    if not found:
        raise InputError(
            f"{what} names {pattern}, which has no channels to remove (heads and what `keep` names lose none); "
            f"expected names such as {', '.join(group.name for group in groups[:3])}"
        )
    return found
