"""What a network computes on its way to the outputs, for distillation."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from retinaface.compression.quantizer import is_in, only_user
from retinaface.compression.structure import Network
from retinaface.model.network import NetworkConfig, RetinaFace

# What gives the features: the pyramid, the context modules after it, or both and the backbone before them.
FeatureLevels = Literal["fpn", "ssh", "all"]

_OF_BACKBONE = {  # at strides 4, 8, 16 and 32
    "mobilenet0.25": ("backbone.stage1.3", "backbone.stage1.5", "backbone.stage2", "backbone.stage3"),
    "resnet50": ("backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4"),
}


class FeatureTap:
    """Keeps the features of every forward pass of a network, for each kind a map per stride, finest first.

    It taps the network when it is made, until :meth:`close` or the end of a ``with`` block, and works in the same way
    for a float and for a fake-quantized network, whose features are those that the next layers read: rounded where
    these read them rounded. The outputs, the weights and what is exported stay the same.

    Args:
        network: Where the features come from.
        levels: ``fpn``, the levels of the pyramid, ``ssh``, those of the context modules, or ``all``: the backbone's,
            the pyramid's and the context modules'.

    Attributes:
        features: ``(B, C, H, W)`` each, of the newest forward pass, with its gradients; empty before the first.
    """

    def __init__(self, network: Network, levels: FeatureLevels) -> None:
        names = _last_modules(network.config, levels)
        self._maps: dict[int, Tensor] = {}
        self._hooks = [
            _outlet(network, name).register_forward_hook(partial(self._keep, index)) for index, name in enumerate(names)
        ]

    def _keep(self, index: int, _module: nn.Module, _inputs: Any, output: Tensor) -> None:  # noqa: ANN401
        self._maps[index] = output

    @property
    def features(self) -> list[Tensor]:
        """In the order of the levels."""
        return [self._maps[index] for index in sorted(self._maps)]

    def close(self) -> None:
        """Leaves the network alone again; the features that it has stay."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last_modules(config: NetworkConfig, levels: FeatureLevels) -> list[str]:
    """Names of the modules whose outputs are the features."""
    count = len(config.strides)
    context = [f"ssh.{index}" for index in range(count)]
    pyramid = [*(f"fpn.merge.{index}" for index in range(count - 1)), f"fpn.lateral.{count - 1}"]
    everything = [*_OF_BACKBONE[config.backbone][-count:], *pyramid, *context]
    return {"fpn": pyramid, "ssh": context, "all": everything}[levels]


def _outlet(network: Network, name: str) -> nn.Module:
    """The module that puts out what the module of this name in the float network does."""
    return network.get_submodule(name) if isinstance(network, RetinaFace) else _graph_outlet(network.graph, name)


def _graph_outlet(graph: GraphModule, name: str) -> nn.Module:
    """Gives a graph, whose modules are gone, one that gets what a module of the float network puts out.

    It has no weights and its own output is not used, so it leaves with the dead code when the graph is converted.
    """
    outlet = f"outlet_{name.replace('.', '_')}"
    if outlet not in dict(graph.named_children()):
        *_, last = (node for node in graph.graph.nodes if is_in(node, [name]))
        rounding = only_user(last)
        with graph.graph.inserting_after(last := rounding if rounding and rounding.op == "call_module" else last):
            graph.add_submodule(outlet, nn.Identity())
            graph.graph.call_module(outlet, (last,))
        graph.recompile()
    return graph.get_submodule(outlet)


def feature_widths(network: Network, levels: FeatureLevels) -> list[int]:
    """Channels of the features, in their order; found by running the network on a small picture."""
    training = network.training
    with FeatureTap(network, levels) as tap, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 64, 64, device=next(network.parameters()).device))
    network.train(training)
    return [maps.shape[1] for maps in tap.features]


def make_adapters(student: Iterable[int], teacher: Iterable[int]) -> nn.ModuleList:
    """Makes what brings a student's features to the widths of the teacher's (arXiv:1412.6550).

    Args:
        student: Channels of the student's features.
        teacher: Channels of the teacher's.

    Returns:
        A module per level, with fresh weights: a 1x1 convolution where the widths differ, else nothing but a passage.
        There are no biases: ``pkd`` and ``cwd`` would not see them, and features begin at 0 behind a ReLU.
    """
    return nn.ModuleList(
        nn.Identity() if own == wanted else nn.Conv2d(own, wanted, 1, bias=False)
        for own, wanted in zip(student, teacher, strict=True)
    )
