"""Post-training quantization: ranges from a few photos, and the biases that rounding shifts put right. No training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    UniformQuantizationObserverBase,
)

from retinaface.compression.quantization import FakeQuantizedRetinaFace
from retinaface.compression.quantizer import CONVOLUTIONS, ActivationFakeQuantize, bias_of, ops
from retinaface.data.annotations import Sample, evenly_spread
from retinaface.errors import InputError
from retinaface.model.network import as_input, pad_small
from retinaface.progress import SizedIterable, with_progress

Observer = Literal["minmax", "moving_average", "histogram", "percentile"]


@dataclass(frozen=True)
class CalibrationSettings:
    """How ranges are found.

    Attributes:
        observer: ``minmax``: all that was seen; ``moving_average``: the ends, averaged over the photos; ``histogram``:
            what makes the squared error of the rounding smallest; ``percentile``: all but the rarest values.
        percentile: Share of the values, in percent, that ``percentile`` keeps on the inner side of each end.
        correct_biases: Whether the mean that each channel loses by rounding is given back to its bias
            (arXiv:1906.04721, section 4.2, from data).
    """

    observer: Observer = "histogram"
    percentile: float = 99.99
    correct_biases: bool = True

    def __post_init__(self) -> None:
        if self.observer not in get_args(Observer):
            raise InputError(
                f"calibration: observer is {self.observer!r}; expected one of {', '.join(get_args(Observer))}"
            )
        if not 50 < self.percentile <= 100:
            raise InputError(f"calibration: percentile is {self.percentile}; expected more than 50, up to 100")


def calibrate(network: FakeQuantizedRetinaFace, pictures: SizedIterable[Tensor], settings: CalibrationSettings) -> None:
    """Finds the ranges of the activations, without training.

    Args:
        network: From :func:`retinaface.compression.quantization.prepare_for_training`; changed in place, left in
            evaluation mode.
        pictures: At least one, ``(B, 3, H, W)`` float32 from :func:`retinaface.model.network.normalize` each.
        settings: How.
    """
    network.eval()
    with torch.no_grad():
        with network.without_rounding():
            observers = _observe(network, pictures, settings.observer)
        for activation, observer in observers.items():
            activation.set_range(*_range(observer, settings))
        if settings.correct_biases:
            _correct_biases(network, pictures)


_OBSERVERS: dict[Observer, type[UniformQuantizationObserverBase]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
    "percentile": HistogramObserver,
}


def _observe(
    network: FakeQuantizedRetinaFace, pictures: SizedIterable[Tensor], observer: Observer
) -> dict[ActivationFakeQuantize, UniformQuantizationObserverBase]:
    """Shows each activation to an observer of its own."""
    observers: dict[ActivationFakeQuantize, UniformQuantizationObserverBase] = {}
    hooks = []

    def observe(activation: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(activation, ActivationFakeQuantize)
        observers[activation](inputs[0].float())

    for activation in network.activations():
        wanted = activation.activation_post_process
        observers[activation] = _OBSERVERS[observer](
            dtype=wanted.dtype, qscheme=wanted.qscheme, quant_min=wanted.quant_min, quant_max=wanted.quant_max
        ).to(wanted.min_val.device)
        hooks.append(activation.register_forward_pre_hook(observe))
    device = next(network.parameters()).device
    for batch in with_progress(pictures, "calibrating"):
        network(batch.to(device))
    for hook in hooks:
        hook.remove()
    return observers


def _range(observer: UniformQuantizationObserverBase, settings: CalibrationSettings) -> tuple[Tensor, Tensor]:
    """The ends of an activation's range."""
    if settings.observer == "histogram":  # torchao searches for them, and tells scale and zero point
        scale, zero_point = observer.calculate_qparams()
        if observer.qscheme == torch.per_tensor_symmetric:
            zero_point = (observer.quant_min + observer.quant_max) / 2
        low, high = ((end - zero_point) * scale for end in (observer.quant_min, observer.quant_max))
        return low.squeeze(), high.squeeze()
    if settings.observer == "percentile":
        share = observer.histogram.cumsum(0) / observer.histogram.sum()
        kept = torch.tensor([1 - settings.percentile / 100, settings.percentile / 100], device=share.device)
        first, last = torch.searchsorted(share, kept).tolist()
        edges = torch.linspace(observer.min_val.item(), observer.max_val.item(), observer.bins + 1)
        return edges[first], edges[min(last, observer.bins - 1) + 1]
    return observer.min_val, observer.max_val


def _correct_biases(network: FakeQuantizedRetinaFace, pictures: SizedIterable[Tensor]) -> None:
    """Adds to each channel's bias what rounding took from its mean, the layers before it corrected already."""
    total: dict[Node, Tensor] = {}
    device = next(network.parameters()).device
    for batch in with_progress(pictures, "correcting biases"):
        with network.without_rounding():
            exact = _ChannelMeans(network.graph)
            exact.run(batch.to(device))
        corrected = _ChannelMeans(network.graph, exact.means)
        corrected.run(batch.to(device))
        for node, difference in corrected.differences.items():
            total[node] = total.get(node, 0) + difference
    for node, difference in total.items():
        name = node.args[2]
        assert isinstance(name, Node)
        network.graph.get_parameter(str(name.target)).add_(difference / len(pictures))


class CalibrationPictures:
    """Photos at their own size as a network takes them, each read when it is asked for: they may not fit in memory.

    Args:
        samples: Where to choose from.
        count: How many, at equal distances; all if there are fewer.
    """

    def __init__(self, samples: Sequence[Sample], count: int) -> None:
        self._samples = evenly_spread(samples, count)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Tensor]:
        """Gives ``(1, 3, H, W)`` float32; an InputError names a photo that cannot be read."""
        for sample in self._samples:
            yield pad_small(as_input(sample.read()))


class _ChannelMeans(Interpreter):
    """Runs the graph and notes the mean of every channel before its activation function.

    Args:
        graph: What to run.
        wanted: Means that the channels are to have instead; they are moved there while the graph runs.
    """

    def __init__(self, graph: GraphModule, wanted: Mapping[Node, Tensor] | None = None) -> None:
        super().__init__(graph)
        self.wanted = wanted
        self.means: dict[Node, Tensor] = {}
        self.differences: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:  # noqa: ANN401
        """As the base class."""
        value = super().run_node(n)
        if not _has_bias(n):
            return value
        self.means[n] = value.mean((0, 2, 3))
        if self.wanted is None:
            return value
        self.differences[n] = self.wanted[n] - self.means[n]
        return value + self.differences[n].view(-1, 1, 1)


def _has_bias(node: Node) -> bool:
    """Whether a node adds a bias per channel: a batch norm, or a convolution without one."""
    return node.target is ops.batch_norm.default or (node.target in CONVOLUTIONS and bias_of(node) is not None)
