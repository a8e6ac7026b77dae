"""Says what a runtime executes in INT8, and how the numbers are rounded there.

torchao's PT2E flow asks a ``Quantizer`` to annotate the graph of the network. This one is the project's own: it knows
which operations each runtime has INT8 kernels for, so that no convolution falls back to float by accident.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)
from typing_extensions import override

from retinaface.model.network import lies_in

BackendName = Literal["onnxruntime", "openvino", "tensorrt"]

ops = torch.ops.aten
CONVOLUTIONS = {ops.conv2d.default}
_ADDITIONS = {ops.add.Tensor}
_POOLING = {ops.max_pool2d.default, ops.upsample_nearest2d.vec}
_ACTIVATION_FUNCTIONS = frozenset({ops.relu.default, ops.leaky_relu.default})


@dataclass(frozen=True)
class Backend:
    """How a runtime wants its INT8.

    Attributes:
        dtype: Type of the activations; weights are int8, symmetric, one scale per output channel.
        symmetric: Whether the zero points of the activations are 0.
        fused: Activation functions that run as a part of the convolution before them.
        float_outputs: Whether an INT8 convolution that nothing in INT8 follows gives its sums as they are.
    """

    dtype: torch.dtype
    symmetric: bool
    fused: frozenset[Any]
    float_outputs: bool

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer of an activation."""
        return (0, 255) if self.dtype is torch.uint8 else (-128, 127)


BACKENDS: dict[BackendName, Backend] = {
    # Has kernels for LeakyReLU in INT8, but none that runs as a part of the convolution. Without a rounded output a
    # convolution runs in float.
    "onnxruntime": Backend(torch.uint8, symmetric=False, fused=frozenset({ops.relu.default}), float_outputs=False),
    # Both activation functions are post-operations of oneDNN's convolution. Float outputs of the heads made the public
    # mobilenet0.25 7 to 11 % faster (OpenVINO 2026.4.1, 640x640); symmetric activations made it no faster, and cost AP.
    "openvino": Backend(torch.uint8, symmetric=False, fused=_ACTIVATION_FUNCTIONS, float_outputs=True),
    # Takes no zero point but 0; see retinaface.delivery.tensorrt.
    "tensorrt": Backend(torch.int8, symmetric=True, fused=_ACTIVATION_FUNCTIONS, float_outputs=True),
}


class ActivationFakeQuantize(FusedMovingAvgObsFakeQuantize):
    """Rounds activations to 8 bits over the moving average of their range.

    Scale and zero point are written out as the kernel that rounded in training computed them. The observer would
    compute them once more, in another way, and not always come to the same.
    """

    @override
    def forward(self, X: Tensor) -> Tensor:
        order = _order_of_memory(X)
        rounded: Tensor = super().forward(X.permute(order))
        return rounded.permute([order.index(axis) for axis in range(X.dim())])

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, ``(1,)`` each, as last used."""
        return self.scale, self.zero_point

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Sets the range, from which training may move on.

        Args:
            low: Scalar; above 0 it counts as 0, which has to be exact.
            high: Scalar; below 0 it counts as 0.
        """
        observer = self.activation_post_process
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)
        scale, zero_point = observer.calculate_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)


class SymmetricActivationFakeQuantize(ActivationFakeQuantize):
    """As the base class, with a zero point of 0.

    The fused kernel would give a range that begins at 0, as after a ReLU, the zero point -128.
    """

    _observes = _rounds = True  # reading the buffers that say so would wait for the device, as torchao's observer does

    def enable_observer(self, enabled: bool = True) -> None:
        """As the base class."""
        super().enable_observer(enabled)
        self._observes = enabled

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """As the base class."""
        super().enable_fake_quant(enabled)
        self._rounds = enabled

    @override
    def forward(self, X: Tensor) -> Tensor:
        """Keeps the shape; gradients pass straight through."""
        if self._observes:
            self._observe(X.detach())
        if not self._rounds:
            return X
        return torch.fake_quantize_per_tensor_affine(
            X, self.scale, self.zero_point.int(), self.quant_min, self.quant_max
        )

    def _observe(self, values: Tensor) -> None:
        observer = self.activation_post_process
        for end, new in zip(
            (observer.min_val, observer.max_val), torch.aminmax(values.permute(_order_of_memory(values))), strict=True
        ):
            moved = end + observer.averaging_constant * (new - end)
            end.copy_(torch.where(end.isinf(), new, moved))  # infinite before the first batch
        largest = torch.maximum(-observer.min_val, observer.max_val).clamp(min=0)
        scale = largest / ((self.quant_max - self.quant_min) / 2)
        self.scale.copy_(scale.clamp(min=torch.finfo(torch.float32).eps))


def _order_of_memory(values: Tensor) -> list[int]:
    """The axes of a tensor from the slowest to the fastest: to look for a range, all else is copied first."""
    channels_last = values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return [0, 2, 3, 1] if channels_last else list(range(values.dim()))


class PerChannelFakeQuantize(FakeQuantizeBase):
    """Rounds weights to symmetric INT8, one scale per output channel, always that of the weights as they are.

    torchao's fused kernel will not do: its scales are those of -128 to 127 and never below 6.1e-5, ``convert_pt2e``
    writes those of -127 to 127. The network would be trained with weights that lie on another grid than the
    exported ones, and the first convolution, whose weights are small since pictures reach to 255, on a very coarse one.
    torchao's plain module would wait for the device at every weight.

    Args:
        dtype: Type of the integers.
        qscheme: As torchao calls it; ``torch.per_channel_symmetric``.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        ch_axis: Dimension of the output channels.
        is_dynamic: False.
    """

    def __init__(
        self, dtype: torch.dtype, qscheme: torch.qscheme, quant_min: int, quant_max: int, ch_axis: int, is_dynamic: bool
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.qscheme = qscheme
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.ch_axis = ch_axis
        self.is_dynamic = is_dynamic
        self.rounds = True
        self.scale = torch.ones(1)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales float32 and zero points int64, ``(channels,)`` each, as last used."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int64)

    def forward(self, weight: Tensor) -> Tensor:
        """Keeps the shape; gradients pass straight through."""
        if not self.rounds:
            return weight
        channels_first = weight.detach().transpose(0, self.ch_axis).flatten(1)
        scale = channels_first.abs().amax(dim=1) / self.quant_max
        self.scale = scale.clamp(min=torch.finfo(torch.float32).eps)
        return torch.fake_quantize_per_channel_affine(
            weight,
            self.scale,
            torch.zeros_like(self.scale),  # integers would be checked against the limits, which waits for the device
            self.ch_axis,
            self.quant_min,
            self.quant_max,
        )


class BackendQuantizer(Quantizer):
    """Annotates what a runtime has INT8 kernels for.

    Args:
        backend: The runtime.
        keep_float: Names of the modules that stay in float.
        averaging: Weight of the newest batch in the moving average of each activation's range.
        weight_bits: 8, or 7 where the products of 8-bit numbers are added up in 16 bits.
    """

    def __init__(self, backend: BackendName, keep_float: Sequence[str], averaging: float, weight_bits: int = 8) -> None:
        super().__init__()
        self.backend = BACKENDS[backend]
        self.keep_float = tuple(keep_float)
        quant_min, quant_max = self.backend.limits
        self.activation = QuantizationSpec(
            dtype=self.backend.dtype,
            quant_min=quant_min,
            quant_max=quant_max,
            qscheme=torch.per_tensor_symmetric if self.backend.symmetric else torch.per_tensor_affine,
            observer_or_fake_quant_ctr=(
                SymmetricActivationFakeQuantize if self.backend.symmetric else ActivationFakeQuantize
            ).with_args(observer=MovingAverageMinMaxObserver, averaging_constant=averaging),
        )
        largest = 2 ** (weight_bits - 1) - 1
        self.weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-largest,
            quant_max=largest,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=PerChannelFakeQuantize,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Says, for each node, which inputs and outputs are quantized."""
        for node in model.graph.nodes:
            if node.op != "call_function" or is_in(node, self.keep_float):
                continue
            if node.target in CONVOLUTIONS:
                inputs = {node.args[0]: self.activation, node.args[1]: self.weight}
                self._annotate_fused(node, inputs, self._with_batch_norm_and_activation(node))
            elif node.target in _ADDITIONS and all(isinstance(arg, Node) and _is_map(arg) for arg in node.args):
                self._annotate_fused(node, dict.fromkeys(node.args, self.activation), self._with_activation(node))
            elif node.target is ops.leaky_relu.default and not _is_quantized(node):
                _set(node, {node.args[0]: self.activation}, self.activation)
            elif node.target in _POOLING:
                _set(node, {node.args[0]: self.activation}, SharedQuantizationSpec((node.args[0], node)))
            elif node.target is ops.cat.default and _is_map(node):
                first, *others = node.args[0]
                shared = SharedQuantizationSpec((first, node))
                _set(node, {first: self.activation, **dict.fromkeys(others, shared)}, shared)
        if self.backend.float_outputs:
            _free_outputs(model)
        return model

    def _annotate_fused(self, node: Node, inputs: dict[Any, QuantizationSpecBase], end: Node) -> None:
        """Annotates the nodes from ``node`` to ``end``, which run as one operation: only its output is rounded."""
        _set(node, inputs, self.activation if end is node else None)
        for fused in _path(node, end):
            _set(fused, {}, self.activation if fused is end else None)

    def _with_activation(self, node: Node) -> Node:
        user = only_user(node)
        return user if user is not None and user.target in self.backend.fused else node

    def _with_batch_norm_and_activation(self, node: Node) -> Node:
        """Last node of convolution, batch norm and activation that run as one operation."""
        user = only_user(node)
        return self._with_activation(user if user is not None and user.target is ops.batch_norm.default else node)

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the annotation is made for this project's own graphs."""


def _set(node: Node, inputs: dict[Any, QuantizationSpecBase], output: QuantizationSpecBase | None) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, _annotated=True)


def _free_outputs(model: GraphModule) -> None:
    """Leaves the outputs of quantized convolutions as they are where nothing that is quantized follows: the heads."""
    for node in model.graph.nodes:
        annotation = node.meta.get("quantization_annotation")
        if node.target in CONVOLUTIONS and annotation and not any(_is_quantized(user) for user in node.users):
            annotation.output_qspec = None


def _is_quantized(node: Node) -> bool:
    return "quantization_annotation" in node.meta


def only_user(node: Node) -> Node | None:
    """The node that uses this one, if it is the only one."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _path(start: Node, end: Node) -> Iterator[Node]:
    """The nodes after ``start`` up to ``end``, each the only user of the one before."""
    while start is not end:
        start = next(iter(start.users))
        yield start


def _is_map(node: Node) -> bool:
    """Whether a node's value is a batch of feature maps, (B, C, H, W), rather than outputs per anchor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4


def module_name(node: Node) -> str:
    """Dotted name of the module that a graph node came from; empty for none."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values()]
    return str(names[-1]) if names else ""


def is_in(node: Node, modules: Sequence[str]) -> bool:
    """Whether a graph node came from one of these modules, or from one below them."""
    name = module_name(node)
    return any(lies_in(name, module) for module in modules)


def bias_of(convolution: Node) -> Node | None:
    """What a convolution adds to each channel, if anything."""
    return convolution.args[2] if len(convolution.args) > 2 else None  # type: ignore[return-value]
