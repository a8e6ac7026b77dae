"""INT8: fake-quantization for training, and conversion to real INT8 weights.

Built on torchao's PT2E flow (export, annotate, prepare, train, convert).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.utils import fold_bn_weights_into_conv_node

from retinaface.compression.quantizer import (
    BACKENDS,
    CONVOLUTIONS,
    ActivationFakeQuantize,
    BackendName,
    BackendQuantizer,
    PerChannelFakeQuantize,
    bias_of,
    is_in,
    only_user,
    ops,
)
from retinaface.errors import InputError
from retinaface.model.network import DYNAMIC_SHAPE, Outputs, RetinaFace, export_example, matching_modules

# Weights of batch norms start away from zero, where the channel says nothing anyway.
_SMALLEST_GAMMA = 1e-6


@dataclass(frozen=True)
class QuantizationSettings:
    """What is quantized, and how the ranges are observed.

    Attributes:
        keep_float: Modules, with all below them, that stay in float: names, with wildcards as in
            :func:`retinaface.model.network.matching_modules`, such as ``backbone.*1`` or ``class_heads``.
        averaging: Weight of the newest batch in the moving average of each activation's range.
        backend: The runtime that it is for: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        weight_bits: 8, or 7 for CPUs without VNNI, whose sums of products of 8-bit numbers saturate at 16 bits.
    """

    keep_float: Sequence[str] = ()
    averaging: float = 0.02
    backend: BackendName = "onnxruntime"
    weight_bits: int = 8

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(
                f"quantization: backend is {self.backend!r}; expected one of {', '.join(get_args(BackendName))}"
            )
        if self.weight_bits not in (7, 8):
            raise InputError(f"quantization: weight_bits is {self.weight_bits}; expected 8, or 7 for CPUs without VNNI")
        if not 0 < self.averaging <= 1:
            raise InputError(f"quantization: averaging is {self.averaging}; expected a weight above 0, up to 1")


class FakeQuantizedRetinaFace(nn.Module):
    """A network whose graph rounds weights and activations as INT8 will, with gradients passed straight through.

    In training mode batch norms use and update batch statistics and the ranges of activations follow the data; in
    evaluation mode, or once they are frozen, they stand still. The ranges of the weights always follow them.

    It computes in float32, whatever autocast says around it: bfloat16 has 8 bits, too few for 255 times any scale, so
    convolutions in it would see inputs and weights that INT8 does not have.

    An exported graph cannot be switched with ``train()`` and ``eval()``, and Lightning sets the ``training`` attribute
    without calling them. So the graph is brought into the module's mode when it is next run.

    Args:
        graph: From ``prepare_qat_pt2e``.
        network: The float network that it was exported from.
        settings: What was prepared.

    Attributes:
        statistics_frozen: Whether the batch norms use and keep the statistics that they have, in training too.
        ranges_frozen: Whether the ranges of the activations stand still, in training too.
    """

    def __init__(self, graph: GraphModule, network: RetinaFace, settings: QuantizationSettings) -> None:
        super().__init__()
        self.config = network.config
        self.settings = settings
        self.graph = graph
        self.statistics_frozen = False
        self.ranges_frozen = False
        self._mode: tuple[bool, bool] | None = None
        self.register_load_state_dict_post_hook(FakeQuantizedRetinaFace._forget_mode)

    def _forget_mode(self, _: object = None) -> None:
        self._mode = None

    def train(self, mode: bool = True) -> "FakeQuantizedRetinaFace":
        """Sets the mode of this module and its observers; the graph itself refuses to be asked."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Outputs:
        """As :meth:`retinaface.model.network.RetinaFace.forward`, in float32."""
        mode = (self.training and not self.statistics_frozen, self.training and not self.ranges_frozen)
        if mode != self._mode:
            self._switch(*mode)
        with torch.autocast(images.device.type, enabled=False):
            outputs: Outputs = self.graph(images.float())
        return outputs

    def _switch(self, live_statistics: bool, live_ranges: bool) -> None:
        for node in self.graph.graph.nodes:
            if node.target is ops.batch_norm.default:
                node.update_arg(5, live_statistics)
            elif node.target is ops.add_.Tensor:
                node.update_arg(1, int(live_statistics))  # number of batches seen by a batch norm
        self.graph.recompile()
        for activation in self.activations():
            activation.enable_observer(live_ranges)
        self._mode = (live_statistics, live_ranges)

    def activations(self) -> list[ActivationFakeQuantize]:
        """What rounds the activations, each once."""
        return [module for module in self.graph.modules() if isinstance(module, ActivationFakeQuantize)]

    @contextmanager
    def without_rounding(self) -> Iterator[None]:
        """Computes in float for a while."""
        self._round(False)
        try:
            yield
        finally:
            self._round(True)

    def _round(self, rounds: bool) -> None:
        for activation in self.activations():
            activation.enable_fake_quant(rounds)
        for module in self.graph.modules():
            if isinstance(module, PerChannelFakeQuantize):
                module.rounds = rounds


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
    graph = _trace(_ready_to_trace(network))
    _free_convolutions(graph)
    _part_float_convolutions(graph, keep_float)
    quantizer = BackendQuantizer(settings.backend, keep_float, settings.averaging, settings.weight_bits)
    # Where there is a GPU, torchao looks for its patterns as traced on that as well: in twice the time, with memory of
    # the first GPU taken by every process. They are the same, and the graph is on the CPU.
    with patch("torch.cuda.is_available", return_value=False):
        prepared = prepare_qat_pt2e(graph, quantizer)
    return FakeQuantizedRetinaFace(prepared, network, settings).train(network.training)


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(each, nn.Conv2d) for each in module.modules())


def _ready_to_trace(network: RetinaFace) -> RetinaFace:
    network = deepcopy(network).train()
    for module in network.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = False  # an observer must see what goes in and what comes out
        elif isinstance(module, nn.BatchNorm2d):
            # Training divides by the batch norm's weight after rounding; a zero would end in NaN.
            module.weight.data[module.weight.abs() < _SMALLEST_GAMMA] = _SMALLEST_GAMMA
    return network


def _trace(network: RetinaFace) -> GraphModule:
    program = torch.export.export(network, (export_example(),), dynamic_shapes=(DYNAMIC_SHAPE,))
    graph = program.module()
    assert isinstance(graph, GraphModule)
    return graph


def _free_convolutions(graph: GraphModule) -> None:
    """Takes feature map sizes from the end of convolution, batch norm and activation instead of the convolution.

    A convolution whose output is also asked for its size has two users and would not be folded with its batch norm.
    """
    for node in list(graph.graph.nodes):
        if node.target is ops.sym_size.int and node.args[0].target in CONVOLUTIONS:
            source = node.args[0]
            end = next(user for user in source.users if user.target is ops.batch_norm.default)
            end = only_user(end) or end
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
        if node.target is ops.batch_norm.default and is_in(convolution := node.args[0], keep_float):
            with graph.graph.inserting_after(convolution):
                parted = graph.graph.call_function(ops.alias.default, (convolution,))
            node.update_arg(0, parted)
    graph.recompile()


def _fold_batch_norms(graph: GraphModule) -> None:
    """Folds every batch norm into its convolution, in the weights before they are rounded.

    torchao would do it for the quantized ones, at the price of a hundred exports of its search patterns (15 seconds).
    """
    for node in list(graph.graph.nodes):
        if node.target is ops.batch_norm.default:
            source = node.args[0]  # the rescaling that training needs, or the no-op of a convolution in float
            convolution = source.args[0]
            weight = convolution.args[1]
            if weight.op == "call_module":  # rounds the weight times the batch norm's scale; now the folded weight
                rounding, weight = weight, weight.args[0].args[0]
                rounding.update_arg(0, weight)
            node.update_arg(0, convolution)
            fold_bn_weights_into_conv_node(convolution, weight, None, node, graph)
        elif node.target is ops.add_.Tensor:
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
    _round_biases(converted)
    return converted


def _round_biases(graph: GraphModule) -> None:
    """Rounds the biases of INT8 convolutions to what INT8 kernels add: whole products of an input and a weight step."""
    for node in graph.graph.nodes:
        if node.target not in CONVOLUTIONS or (bias := bias_of(node)) is None:
            continue
        images, weight = node.args[:2]
        if not all(source.op == "call_function" and "dequantize" in str(source.target) for source in (images, weight)):
            continue  # stays in float
        step = images.args[1] * graph.get_buffer(str(weight.args[1].target))
        values = graph.get_parameter(str(bias.target))
        values.data = (values / step).round() * step
