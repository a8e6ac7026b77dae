"""What a network consists of, layer by layer, and what pruning left of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Column, Table
from torch import Tensor, nn

from retinaface.compression.pruning import count_complexity
from retinaface.compression.structure import Structure
from retinaface.model.network import RetinaFace


@dataclass(frozen=True)
class Layer:
    """A convolution.

    Attributes:
        name: Of the module.
        kernel: Height and width in pixels.
        stride: Step in pixels.
        depthwise: Whether every channel is filtered by itself.
        channels_before: Output channels before pruning.
        channels: Output channels.
        params: Weights and biases.
        macs: Multiply-accumulate operations for one picture.
    """

    name: str
    kernel: tuple[int, ...]
    stride: int
    depthwise: bool
    channels_before: int
    channels: int
    params: int
    macs: int


@dataclass(frozen=True)
class Description:
    """A network.

    Attributes:
        layers: Its convolutions, in order.
        params: Parameters of the whole network, batch norms included.
        macs: Of the whole network, for one picture.
        params_before: Parameters before pruning.
        macs_before: MACs before pruning.
        size: Side of the picture in pixels.
    """

    layers: list[Layer]
    params: int
    macs: int
    params_before: int
    macs_before: int
    size: int


def describe(structure: Structure, size: int = 640) -> Description:
    """Describes the network of a checkpoint, the float one if it is quantized: the same layers.

    Args:
        structure: How it is built.
        size: Side of the picture for the MACs, in pixels.
    """
    return compare(RetinaFace(structure.network), structure.build_float(), size)


def compare(before: RetinaFace, after: RetinaFace, size: int = 640) -> Description:
    """Describes a network and what it was before pruning.

    Args:
        before: The network before.
        after: What is left of it.
        size: Side of the picture for the MACs, in pixels.
    """
    widths = {name: module.out_channels for name, module in _convolutions(before)}
    positions = _output_positions(after, size)
    layers = [
        Layer(
            name=name,
            kernel=tuple(module.kernel_size),
            stride=module.stride[0],
            depthwise=module.groups > 1,
            channels_before=widths[name],
            channels=module.out_channels,
            params=sum(parameter.numel() for parameter in module.parameters()),
            macs=positions[name] * module.weight.numel(),
        )
        for name, module in _convolutions(after)
    ]
    return Description(layers, *count_complexity(after, size), *count_complexity(before, size), size)


def _convolutions(network: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]


def _output_positions(network: RetinaFace, size: int) -> dict[str, int]:
    """Height times width of every convolution's output, 0 for one that is not used."""
    positions = {name: 0 for name, _ in _convolutions(network)}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        positions[name] = output.shape[2] * output.shape[3]

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in _convolutions(network)]
    training = network.training
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return positions


def description_table(description: Description, title: str) -> Table:
    """Lays a description out for the terminal.

    Args:
        description: What to show.
        title: What to say above.
    """
    right = [Column(name, justify="right") for name in ("channels", "params", "MMACs")]
    table = Table(
        Column("layer", no_wrap=True),
        "kernel",
        Column("stride", justify="right"),
        *right,
        title=f"{title} (MACs at {description.size}x{description.size})",
    )
    for layer in description.layers:
        table.add_row(
            layer.name,
            f"{'x'.join(map(str, layer.kernel))}{' dw' if layer.depthwise else ''}",
            str(layer.stride),
            _change(layer),
            f"{layer.params:,}",
            f"{layer.macs / 1e6:.2f}",
        )
    table.add_section()
    for name, params, macs in (
        ("all, with batch norms", description.params, description.macs),
        ("before pruning", description.params_before, description.macs_before),
    ):
        table.add_row(name, "", "", "", f"{params:,}", f"{macs / 1e6:.2f}")
    return table


def _change(layer: Layer) -> str:
    same = layer.channels == layer.channels_before
    return str(layer.channels) if same else f"{layer.channels_before} → {layer.channels}"


def kept_channels(layers: Sequence[Layer]) -> dict[str, tuple[int, int]]:
    """Layer name to output channels before and after, without the depthwise ones, which have those of the layer before.

    Args:
        layers: The convolutions.
    """
    return {layer.name: (layer.channels_before, layer.channels) for layer in layers if not layer.depthwise}
