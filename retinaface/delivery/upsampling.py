"""Upsampling of INT8 maps in ONNX files, in operations that ONNX Runtime is fast at."""

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

_CONSTANTS = {
    "upsample_rows_joined": [0, 0, -1],
    "upsample_twice": [1, 2, 2, 1],
    "upsample_from": [0, 0],
    "upsample_axes": [1, 2],
    "upsample_size_from": [2],
    "upsample_size_to": [4],
}


def upsample_by_copying(graph: GraphProto) -> None:
    """Writes each quantized Resize of the feature pyramid as copies of its 8-bit values.

    ONNX Runtime computes INT8 convolutions with channels last, and its Resize is slow there (1.32: 6 % of the time of
    mobilenet0.25). With channels last two equal pixels are the channels twice, and two equal rows are the row twice:
    two Concats. The Transposes around them cancel with those that ONNX Runtime puts between convolutions.

    A level of the pyramid has ``ceil(n / 2)`` rows where the next finer one has ``n``. So nearest neighbours, row ``i``
    from row ``floor(i * ceil(n / 2) / n)``, which is ``floor(i / 2)``, are all rows twice, without the last one where
    ``n`` is odd; columns likewise.

    Args:
        graph: With each Resize between a DequantizeLinear and a QuantizeLinear of one scale and zero point; changed in
            place. A Resize in float stays.
    """
    producers = {output: node for node in graph.node for output in node.output}
    nodes: list[NodeProto] = []
    replaced: list[NodeProto] = []
    for node in graph.node:
        quantize = _quantize_after(node, graph, producers)
        if quantize is not None:
            nodes.extend(_copies(node.name, producers[node.input[0]].input[0], node.input[3], quantize.output[0]))
            replaced.append(quantize)
        elif node not in replaced:
            nodes.append(node)
    if replaced:
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in _CONSTANTS.items())


def _quantize_after(node: NodeProto, graph: GraphProto, producers: Mapping[str, NodeProto]) -> NodeProto | None:
    """What quantizes a Resize of an INT8 map as the map itself is; None for any other node."""
    if node.op_type != "Resize" or producers[node.input[0]].op_type != "DequantizeLinear":
        return None
    users = [user for user in graph.node if node.output[0] in user.input]
    same_steps = producers[node.input[0]].input[1:]
    alike = [user.op_type == "QuantizeLinear" and user.input[1:] == same_steps for user in users]
    return users[0] if alike == [True] else None


def _copies(name: str, coarser: str, size: str, finer: str) -> list[NodeProto]:
    """Operations that make a map ``finer``, of ``size`` (B, C, H, W), from the 8-bit map ``coarser``."""
    nodes: list[NodeProto] = []

    def node(kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        step = f"{name}.{len(nodes)}"
        output = output or step
        nodes.append(helper.make_node(kind, inputs, [output], step, **attributes))
        return output

    pixels = node("Transpose", coarser, perm=[0, 2, 3, 1])
    wide = node("Concat", pixels, pixels, axis=3)  # (B, h, w, 2 C)
    rows = node("Reshape", wide, "upsample_rows_joined")  # (B, h, 2 w C)
    high = node("Concat", rows, rows, axis=2)
    doubled = node("Mul", node("Shape", pixels), "upsample_twice")
    whole = node("Reshape", high, doubled)  # (B, 2 h, 2 w, C)
    height_and_width = node("Slice", size, "upsample_size_from", "upsample_size_to")
    cut = node("Slice", whole, "upsample_from", height_and_width, "upsample_axes")
    node("Transpose", cut, output=finer, perm=[0, 3, 1, 2])
    return nodes
