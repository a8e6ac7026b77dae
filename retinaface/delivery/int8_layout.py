"""Arranges INT8 networks in ONNX files as ONNX Runtime is fast with them."""

from collections import Counter
from collections.abc import Mapping
from itertools import chain

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

_ACTIVATIONS = ("Relu", "LeakyRelu")  # which leave zeros as they are

_CHANNELS_LAST, _CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]

_CONSTANTS = {
    "layout.flat": [-1],
    "layout.joined_rows": [0, 0, -1],
    "layout.twice": [1, 2, 2, 1],
    "layout.size_from": [2],
    "layout.size_to": [4],
    "layout.corner": [0, 0],
    "layout.axes": [1, 2],
}


def use_channels_last(graph: GraphProto) -> None:
    """Rewrites what ONNX Runtime is slow at in an INT8 network; no number changes.

    It computes INT8 convolutions with channels last and puts Transposes around all else, of which most cancel. Two that
    do not took 8 % of the time of mobilenet0.25 (ONNX Runtime 1.32, two cores with INT8 instructions):

    - **Upsampling**: its Resize is slow with channels last. There, two equal pixels are the channels twice, and two
      equal rows are the row twice: two Concats. A level of the pyramid has ``ceil(n / 2)`` rows where the next finer
      one has ``n``. So nearest neighbours, row ``i`` from row ``floor(i * ceil(n / 2) / n)``, which is
      ``floor(i / 2)``, are all rows twice, without the last one where ``n`` is odd; columns likewise.
    - **From float to INT8**: it turns the bytes, in one thread. Turned before it is rounded, a map leaves the float
      convolution's own layout in all threads. The Reshapes keep ONNX Runtime from changing the order back.

    Args:
        graph: With QuantizeLinear and DequantizeLinear nodes; changed in place.
    """
    producers = {output: node for node in graph.node for output in node.output}
    steps: dict[str, list[NodeProto]] = {}  # in the place of a node, by its name
    for node in graph.node:
        quantize = _quantize_after_resize(node, graph, producers)
        if quantize is not None:
            coarser = producers[node.input[0]].input[0]
            steps |= {node.name: _copies(node, coarser, quantize.output[0]), quantize.name: []}
        elif _leaves_float_convolution(node, producers):
            steps[node.name] = _turned(node)
    constants = {name for node in chain(*steps.values()) for name in node.input} & _CONSTANTS.keys()
    nodes = [each for node in graph.node for each in steps.get(node.name, [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(np.array(_CONSTANTS[name]), name) for name in sorted(constants))


def widen_float_layers(graph: GraphProto, least: int) -> None:
    """Fills narrow float layers up with channels of zeros: the same sums, added in another order.

    ONNX Runtime computes float convolutions with channels in blocks, of 16 with AVX-512 and of 8 with AVX2. Layers with
    fewer are computed as whole blocks all the same, but taken apart for a convolution that sums over channels. The
    first layers of mobilenet0.25 have 8: filled up to 16, the network with its first stage in float and LeakyReLU takes
    6 to 10 % less time with AVX-512, and 7 % more with AVX2 (ONNX Runtime 1.32, two cores; for AVX2 those of the same
    CPU, without the rest of its instructions).

    Filled are layers that go through activations and depthwise convolutions alone into such a convolution, unless
    something else takes what they give, or has the same weights.

    Args:
        graph: Changed in place.
        least: Channels that such layers have afterwards.
    """
    producers = {output: node for node in graph.node for output in node.output}
    constants = {constant.name: constant for constant in graph.initializer}
    uses = Counter(chain(*(node.input for node in graph.node), (output.name for output in graph.output)))
    for last in graph.node:
        if _is_float_convolution(last, producers) and _groups(last) == 1:
            layers = _narrow_layers(last, least, producers, constants, uses)
            for layer in layers:
                for name in layer.input[1:]:  # weights and biases
                    _fill(constants[name], 0, least)
                for attribute in layer.attribute:
                    if attribute.name == "group":
                        attribute.i = least
            if layers:
                _fill(constants[last.input[1]], 1, least)


def _narrow_layers(
    last: NodeProto,
    least: int,
    producers: Mapping[str, NodeProto],
    constants: Mapping[str, TensorProto],
    uses: Mapping[str, int],
) -> list[NodeProto]:
    """The convolutions that a convolution's few channels come from; none where any of it is used elsewhere too."""
    channels = constants[last.input[1]].dims[1]
    layers: list[NodeProto] = []
    value = last.input[0]
    while channels < least and uses[value] == 1 and value in producers:
        node = producers[value]
        if _is_float_convolution(node, producers):
            layers.append(node)
            if _groups(node) == 1:
                own = [name for layer in (last, *layers) for name in layer.input[1:]]
                return layers if all(uses[name] == 1 for name in own) else []
            if _groups(node) != channels:
                return []
        elif node.op_type not in _ACTIVATIONS:
            return []
        value = node.input[0]
    return []


def _fill(constant: TensorProto, axis: int, least: int) -> None:
    values = numpy_helper.to_array(constant)
    widths = [(0, least - values.shape[axis] if each == axis else 0) for each in range(values.ndim)]
    constant.CopyFrom(numpy_helper.from_array(np.pad(values, widths), constant.name))


def _groups(convolution: NodeProto) -> int:
    return next((attribute.i for attribute in convolution.attribute if attribute.name == "group"), 1)


def _quantize_after_resize(node: NodeProto, graph: GraphProto, producers: Mapping[str, NodeProto]) -> NodeProto | None:
    """What quantizes a Resize of an INT8 map as the map itself is; None for any other node."""
    if node.op_type != "Resize" or producers[node.input[0]].op_type != "DequantizeLinear":
        return None
    users = [user for user in graph.node if node.output[0] in user.input]
    same_steps = producers[node.input[0]].input[1:]
    alike = [user.op_type == "QuantizeLinear" and user.input[1:] == same_steps for user in users]
    return users[0] if alike == [True] else None


def _leaves_float_convolution(node: NodeProto, producers: Mapping[str, NodeProto]) -> bool:
    """Whether a QuantizeLinear takes what a float convolution, and an activation, has computed."""
    if node.op_type != "QuantizeLinear":
        return False
    source = producers.get(node.input[0])
    if source is not None and source.op_type in _ACTIVATIONS:
        source = producers.get(source.input[0])
    return source is not None and _is_float_convolution(source, producers)


def _is_float_convolution(node: NodeProto, producers: Mapping[str, NodeProto]) -> bool:
    # Its weights are constants; those of an INT8 one are dequantized.
    return node.op_type == "Conv" and node.input[1] not in producers


class _Steps(list[NodeProto]):
    """Operations in the place of one that is called ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        """Appends an operation; gives the name of its output."""
        name = f"{self.name}.{len(self)}"
        self.append(helper.make_node(kind, inputs, [output or name], name, **attributes))
        return output or name


def _copies(resize: NodeProto, coarser: str, finer: str) -> _Steps:
    """Makes the 8-bit map ``finer`` from ``coarser``, ``(B, C, h, w)``."""
    steps = _Steps(resize.name)
    pixels = steps.add("Transpose", coarser, perm=_CHANNELS_LAST)
    wide = steps.add("Concat", pixels, pixels, axis=3)  # (B, h, w, 2 C)
    rows = steps.add("Reshape", wide, "layout.joined_rows")  # (B, h, 2 w C)
    high = steps.add("Concat", rows, rows, axis=2)  # (B, h, 4 w C)
    doubled = steps.add("Mul", steps.add("Shape", pixels), "layout.twice")
    whole = steps.add("Reshape", high, doubled)  # (B, 2 h, 2 w, C)
    size = steps.add("Slice", resize.input[3], "layout.size_from", "layout.size_to")
    cut = steps.add("Slice", whole, "layout.corner", size, "layout.axes")
    steps.add("Transpose", cut, perm=_CHANNELS_FIRST, output=finer)
    return steps


def _turned(quantize: NodeProto) -> _Steps:
    """Rounds a float map with channels last.

    It is said twice, as OpenVINO, which runs these files too, has INT8 convolutions only behind such a pair.
    """
    steps = _Steps(quantize.name)
    scale, zero_point = quantize.input[1:]
    pixels = steps.add("Transpose", quantize.input[0], perm=_CHANNELS_LAST)
    flat = steps.add("Reshape", pixels, "layout.flat")
    rounded = steps.add("QuantizeLinear", flat, scale, zero_point)
    values = steps.add("DequantizeLinear", rounded, scale, zero_point)
    shaped = steps.add("Reshape", values, steps.add("Shape", pixels))
    turned = steps.add("Transpose", shaped, perm=_CHANNELS_FIRST)
    steps.add("QuantizeLinear", turned, scale, zero_point, output=quantize.output[0])
    return steps
