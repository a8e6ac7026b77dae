"""INT8: fake-quantization for training, and conversion to real INT8 weights.

Built on torchao's PT2E flow (export, annotate, prepare, train, convert). The quantizer here is the project's own: it
annotates exactly the operations that ONNX Runtime executes in INT8, so that no convolution falls back to float by
accident.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.utils import fold_bn_weights_into_conv_node

from retinaface.errors import InputError
from retinaface.model.network import DYNAMIC_SHAPE, Outputs, RetinaFace, export_example, matching_modules

_ops = torch.ops.aten
_CONVOLUTIONS = {_ops.conv2d.default}
_ADDITIONS = {_ops.add.Tensor}
_POOLING = {_ops.max_pool2d.default, _ops.upsample_nearest2d.vec}

HEADS = ("class_heads", "box_heads", "landmark_heads")

# Weights of batch norms start away from zero, where the channel says nothing anyway.
_SMALLEST_GAMMA = 1e-6


@dataclass(frozen=True)
class QuantizationSettings:
    """What is quantized, and how the ranges are observed.

    Attributes:
        keep_float: Modules, with all below them, that stay in float: names, with wildcards as in
            :func:`retinaface.model.network.matching_modules`, such as ``backbone.*1`` or ``class_heads``. A single
            convolution (with ReLU) between two in INT8 stays in float in the file, but ONNX Runtime rounds its weights
            on its own; name a whole block.
        averaging: Weight of the newest batch in the moving average of each activation's range.
    """

    keep_float: Sequence[str] = field(default=HEADS)
    averaging: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.averaging <= 1:
            raise InputError(f"quantization: averaging is {self.averaging}; expected a weight above 0, up to 1")


class ActivationFakeQuantize(FusedMovingAvgObsFakeQuantize):
    """Rounds activations to uint8 over the moving average of their range.

    Scale and zero point are written out as the kernel that rounded in training computed them. The observer would
    compute them once more, in another way, and not always come to the same.
    """

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, ``(1,)`` each, as last used."""
        return self.scale, self.zero_point

    def forward(self, X: Tensor) -> Tensor:
        """Keeps shape and type; rounds in float32, also where autocast computes in bfloat16."""
        rounded: Tensor = super().forward(X.float())
        return rounded.to(X.dtype)


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
        self.scale = torch.ones(1)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales float32 and zero points int64, ``(channels,)`` each, as last used."""
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int64)

    def forward(self, weight: Tensor) -> Tensor:
        """Keeps the shape; gradients pass straight through."""
        channels_first = weight.detach().float().transpose(0, self.ch_axis).flatten(1)
        scale = channels_first.abs().amax(dim=1) / self.quant_max
        self.scale = scale.clamp(min=torch.finfo(torch.float32).eps)
        return torch.fake_quantize_per_channel_affine(
            weight,
            self.scale,
            torch.zeros_like(self.scale, dtype=torch.int32),
            self.ch_axis,
            self.quant_min,
            self.quant_max,
        )


class OnnxRuntimeQuantizer(Quantizer):
    """Annotates what ONNX Runtime's CPU provider has INT8 kernels for.

    Activations are uint8 with a zero point, over the full range of 8 bits; weights are int8, symmetric, one scale per
    output channel.

    Args:
        keep_float: Names of the modules that stay in float.
        averaging: Weight of the newest batch in the moving average of each activation's range.
    """

    def __init__(self, keep_float: Sequence[str], averaging: float) -> None:
        super().__init__()
        self.keep_float = tuple(keep_float)
        self.activation = QuantizationSpec(
            dtype=torch.uint8,
            quant_min=0,
            quant_max=255,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=ActivationFakeQuantize.with_args(
                observer=MovingAverageMinMaxObserver, averaging_constant=averaging
            ),
        )
        self.weight = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=PerChannelFakeQuantize,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Says, for each node, which inputs and outputs are quantized."""
        for node in model.graph.nodes:
            if node.op != "call_function" or _is_in(node, self.keep_float):
                continue
            if node.target in _CONVOLUTIONS:
                inputs = {node.args[0]: self.activation, node.args[1]: self.weight}
                self._annotate_fused(node, inputs, _with_batch_norm_and_relu(node))
            elif node.target in _ADDITIONS and all(isinstance(arg, Node) and _is_map(arg) for arg in node.args):
                self._annotate_fused(node, dict.fromkeys(node.args, self.activation), _with_relu(node))
            elif node.target is _ops.leaky_relu.default:
                _set(node, {node.args[0]: self.activation}, self.activation)
            elif node.target in _POOLING:
                _set(node, {node.args[0]: self.activation}, SharedQuantizationSpec((node.args[0], node)))
            elif node.target is _ops.cat.default and _is_map(node):
                first, *others = node.args[0]
                shared = SharedQuantizationSpec((first, node))
                _set(node, {first: self.activation, **dict.fromkeys(others, shared)}, shared)
        return model

    def _annotate_fused(self, node: Node, inputs: dict[Any, QuantizationSpecBase], end: Node) -> None:
        """Annotates the nodes from ``node`` to ``end``, which run as one operation: only its output is rounded."""
        _set(node, inputs, self.activation if end is node else None)
        for fused in _path(node, end):
            _set(fused, {}, self.activation if fused is end else None)

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the annotation is made for this project's own graphs."""


def _set(node: Node, inputs: dict[Any, QuantizationSpecBase], output: QuantizationSpecBase | None) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, _annotated=True)


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _with_relu(node: Node) -> Node:
    user = _only_user(node)
    return user if user is not None and user.target is _ops.relu.default else node


def _with_batch_norm_and_relu(node: Node) -> Node:
    """Last node of convolution, batch norm and ReLU that run as one operation."""
    user = _only_user(node)
    return _with_relu(user if user is not None and user.target is _ops.batch_norm.default else node)


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


def _is_in(node: Node, modules: Sequence[str]) -> bool:
    name = module_name(node)
    return any(name == module or name.startswith(f"{module}.") for module in modules)


class FakeQuantizedRetinaFace(nn.Module):
    """A network whose graph rounds weights and activations as INT8 will, with gradients passed straight through.

    In training mode batch norms use and update batch statistics and the ranges of activations follow the data; in
    evaluation mode, or once :meth:`freeze` was called, both stand still. The ranges of the weights always follow them.

    An exported graph cannot be switched with ``train()`` and ``eval()``, and Lightning sets the ``training`` attribute
    without calling them. So the graph is brought into the module's mode when it is next run.

    Args:
        graph: From ``prepare_qat_pt2e``.
        network: The float network that it was exported from.
    """

    def __init__(self, graph: GraphModule, network: RetinaFace) -> None:
        super().__init__()
        self.config = network.config
        self.graph = graph
        self.frozen = False
        self._mode: bool | None = None
        self.register_load_state_dict_post_hook(FakeQuantizedRetinaFace._forget_mode)

    def _forget_mode(self, _: object = None) -> None:
        self._mode = None

    def freeze(self, frozen: bool = True) -> None:
        """Stops (or lets go on) the updates of batch statistics and of the ranges of activations."""
        self.frozen = frozen

    def train(self, mode: bool = True) -> "FakeQuantizedRetinaFace":
        """Sets the mode of this module and its observers; the graph itself refuses to be asked."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Outputs:
        """As :meth:`retinaface.model.network.RetinaFace.forward`."""
        live = self.training and not self.frozen
        if live != self._mode:
            self._switch(live)
        outputs: Outputs = self.graph(images)
        return outputs

    def _switch(self, live: bool) -> None:
        for node in self.graph.graph.nodes:
            if node.target is _ops.batch_norm.default:
                node.update_arg(5, live)
            elif node.target is _ops.add_.Tensor:
                node.update_arg(1, int(live))  # number of batches seen by a batch norm
        self.graph.recompile()
        for module in self.graph.modules():
            if isinstance(module, ActivationFakeQuantize):
                module.enable_observer(live)
        self._mode = live


def prepare_for_training(network: RetinaFace, settings: QuantizationSettings) -> FakeQuantizedRetinaFace:
    """Exports a float network and inserts fake-quantization, with convolution and batch norm folded in training.

    Args:
        network: Float network, pruned or not, on the CPU; left as it was.
        settings: What to quantize.

    Returns:
        The network to train, sharing no parameter with the given one.

    Raises:
        InputError: ``keep_float`` names a module that the network does not have.
    """
    keep_float: list[str] = []
    for pattern in settings.keep_float:
        matching = matching_modules(network, [pattern], "quantization: keep_float")
        if not any(_has_convolution(network.get_submodule(name)) for name in matching):
            raise InputError(
                f"quantization: keep_float names {pattern}, which holds no convolution; name the module around it"
            )
        keep_float += matching
    graph = _export(network)
    _free_convolutions(graph)
    _part_float_convolutions(graph, keep_float)
    prepared = prepare_qat_pt2e(graph, OnnxRuntimeQuantizer(keep_float, settings.averaging))
    return FakeQuantizedRetinaFace(prepared, network).train(network.training)


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Conv2d) for each in module.modules())


def _export(network: RetinaFace) -> GraphModule:
    network = deepcopy(network).train()
    for module in network.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = False  # an observer must see what goes in and what comes out
        elif isinstance(module, nn.BatchNorm2d):
            # Training divides by the batch norm's weight after rounding; a zero would end in NaN.
            module.weight.data[module.weight.abs() < _SMALLEST_GAMMA] = _SMALLEST_GAMMA
    program = torch.export.export(network, (export_example(),), dynamic_shapes=(DYNAMIC_SHAPE,))
    graph = program.module()
    assert isinstance(graph, GraphModule)
    return graph


def _free_convolutions(graph: GraphModule) -> None:
    """Takes feature map sizes from the end of convolution, batch norm and activation instead of the convolution.

    A convolution whose output is also asked for its size has two users and would not be folded with its batch norm.
    """
    for node in list(graph.graph.nodes):
        if node.target is _ops.sym_size.int and node.args[0].target in _CONVOLUTIONS:
            source = node.args[0]
            end = next(user for user in source.users if user.target is _ops.batch_norm.default)
            end = _only_user(end) or end
            node.update_arg(0, end)
            end.append(node)
    graph.graph.lint()
    graph.recompile()


def _part_float_convolutions(graph: GraphModule, keep_float: Sequence[str]) -> None:
    """Puts a no-op between convolution and batch norm where both stay in float.

    torchao rewrites every pair that it finds for training with quantized weights, and folds only quantized ones again:
    a float pair would be left with three extra operations and its batch norm.
    """
    for node in list(graph.graph.nodes):
        if node.target is _ops.batch_norm.default and _is_in(convolution := node.args[0], keep_float):
            with graph.graph.inserting_after(convolution):
                parted = graph.graph.call_function(_ops.alias.default, (convolution,))
            node.update_arg(0, parted)
    graph.recompile()


def _fold_batch_norms(graph: GraphModule) -> None:
    """Folds every batch norm into its convolution, in the weights before they are rounded.

    torchao would do it for the quantized ones, at the price of a hundred exports of its search patterns (15 seconds).
    """
    for node in list(graph.graph.nodes):
        if node.target is _ops.batch_norm.default:
            source = node.args[0]  # the rescaling that training needs, or the no-op of a convolution in float
            convolution = source.args[0]
            weight = convolution.args[1]
            if weight.op == "call_module":  # rounds the weight times the batch norm's scale; now the folded weight
                rounding, weight = weight, weight.args[0].args[0]
                rounding.update_arg(0, weight)
            node.update_arg(0, convolution)
            fold_bn_weights_into_conv_node(convolution, weight, None, node, graph)
        elif node.target is _ops.add_.Tensor:
            graph.graph.erase_node(node)  # number of batches seen
    graph.graph.eliminate_dead_code()
    graph.recompile()


def convert(network: FakeQuantizedRetinaFace) -> GraphModule:
    """Turns a trained fake-quantized network into one with INT8 weights between quantize and dequantize operations.

    Args:
        network: Left as it was.

    Returns:
        Graph in evaluation mode with the outputs of :meth:`retinaface.model.network.RetinaFace.forward`.
    """
    network = deepcopy(network).cpu().eval()
    with torch.no_grad():
        _fold_batch_norms(network.graph)
        network(torch.zeros(1, 3, 64, 64))  # the ranges of the weights as they are now
    converted = convert_pt2e(network.graph)
    assert isinstance(converted, GraphModule)
    return converted
