"""Checks that an INT8 ONNX file has the form that TensorRT takes, without TensorRT."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper


def require_tensorrt_form(model: onnx.ModelProto) -> None:
    """Checks the explicit quantization of a model: what TensorRT's parser refuses, and what it would run in float.

    Every zero point is an int8 0: the parser refuses others ("Non-zero zero point is not supported", NVIDIA/TensorRT
    issues 2774 and 4698). Quantized weights have one scale per output channel, axis 0, and a convolution with such
    weights takes its input from a DequantizeLinear (NVIDIA's documentation, "Explicit quantization": all inputs of a
    weighted operation are quantized). No batch norm is left, which would stand between a convolution and the
    QuantizeLinear after it. A convolution with float weights stays in float, whatever its input.

    Args:
        model: With QuantizeLinear and DequantizeLinear nodes; only looked at.

    Raises:
        RuntimeError: Names the node that is otherwise; a fault of this project.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        problem = _problem(node, initializers, producers)
        if problem:
            raise RuntimeError(f"not in TensorRT's form: {node.op_type} {node.name} {problem}")


def _problem(
    node: NodeProto, initializers: Mapping[str, TensorProto], producers: Mapping[str, NodeProto]
) -> str | None:
    """What is wrong with a node, to be read after its name; None for nothing."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _zero_point_problem(node, initializers)
    if node.op_type == "Conv":
        return _convolution_problem(node, initializers, producers)
    if node.op_type == "BatchNormalization":
        return "is not folded into a convolution"
    return None


def _zero_point_problem(node: NodeProto, initializers: Mapping[str, TensorProto]) -> str | None:
    zero_point = initializers.get(node.input[2]) if len(node.input) > 2 else None
    if zero_point is None or zero_point.data_type != TensorProto.INT8:
        return "has no constant int8 zero point"
    if np.any(numpy_helper.to_array(zero_point)):
        return "has a zero point other than 0"
    return None


def _convolution_problem(
    node: NodeProto, initializers: Mapping[str, TensorProto], producers: Mapping[str, NodeProto]
) -> str | None:
    weight = producers.get(node.input[1])
    if weight is None:
        return None  # a constant: the convolution stays in float
    if weight.op_type != "DequantizeLinear" or weight.input[0] not in initializers:
        return "has weights that are neither float constants nor dequantized int8 ones"
    channels = initializers[weight.input[0]].dims[0]
    axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), 1)  # 1 by ONNX's default
    scale = initializers.get(weight.input[1])
    if axis != 0 or scale is None or list(scale.dims) != [channels]:
        return f"has weights without one scale for each of its {channels} output channels (axis 0)"
    source = producers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return "has quantized weights, but an input in float"
    return None
