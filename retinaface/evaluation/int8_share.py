"""How many convolutions a runtime executes in INT8: counted in what it made of a file, not in the file.

A file only says where numbers are rounded. What becomes of it is the runtime's decision: it may fuse the rounding into
an INT8 kernel, compute in float between a dequantize and a quantize, or round weights that the file has in float.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
from onnx import NodeProto

from retinaface.delivery.session import compile_for_openvino, open_session
from retinaface.errors import InputError

RuntimeName = Literal["onnxruntime", "openvino"]

# Of ONNX, of com.microsoft (with activation function; channels last) and of com.microsoft.nchwc (channels in blocks).
_ORT_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv"}
_ORT_INT8 = {"QLinearConv"}
_OPENVINO_INT8 = {"i8", "u8"}


@dataclass(frozen=True)
class Int8Share:
    """What a runtime does with the convolutions of a network.

    Attributes:
        int8: How many it executes in INT8.
        total: How many it executes.
        float_names: Modules of the network whose convolutions it executes in float, in the order of the file; names of
            nodes where the file does not tell the module.
    """

    int8: int
    total: int
    float_names: tuple[str, ...]


@dataclass(frozen=True)
class _Executed:
    """A convolution of the graph that a runtime executes.

    Attributes:
        in_int8: Whether it is an INT8 kernel.
        sources: Names of the nodes in the file that it came from, if the runtime tells.
    """

    in_int8: bool
    sources: frozenset[str]


def convolutions_in_int8(path: Path, runtime: RuntimeName = "onnxruntime") -> Int8Share:
    """Counts the convolutions that a runtime executes in INT8 on this machine's CPU.

    Args:
        path: ONNX file.
        runtime: ``onnxruntime``, as :func:`retinaface.delivery.runtime.load_detector` runs it: its graph after all
            optimizations; or ``openvino``, with its own defaults: the execution graph of the compiled model.

    Returns:
        The counts, and what is left in float.

    Raises:
        InputError: The file cannot be read, or OpenVINO is not installed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an ONNX model")
    executed = _executed_by_openvino(path) if runtime == "openvino" else _executed_by_onnxruntime(path)
    in_int8 = {source for convolution in executed if convolution.in_int8 for source in convolution.sources}
    modules = _convolution_modules(onnx.load(path))
    return Int8Share(
        int8=sum(convolution.in_int8 for convolution in executed),
        total=len(executed),
        float_names=tuple(module for node, module in modules if node not in in_int8),
    )


def _executed_by_onnxruntime(path: Path) -> list[_Executed]:
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized=optimized)
        nodes = onnx.load(optimized).graph.node
    return [
        # A copy of a node is called as it was, with a number.
        _Executed(node.op_type in _ORT_INT8, frozenset([re.sub(r"_token_\d+$", "", node.name)]))
        for node in nodes
        if node.op_type in _ORT_INT8 | _ORT_FLOAT
    ]


def _executed_by_openvino(path: Path) -> list[_Executed]:
    executed = []
    for operation in compile_for_openvino(path).get_runtime_model().get_ops():
        facts = {name: value.astype(str) for name, value in operation.get_rt_info().items()}
        if facts["layerType"] == "Convolution":
            sources = frozenset(facts["originalLayersNames"].split(","))
            executed.append(_Executed(facts["runtimePrecision"] in _OPENVINO_INT8, sources))
    return executed


def _convolution_modules(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Gives the name of every convolution's node and of the module that it came from."""
    for node in model.graph.node:
        if node.op_type == "Conv":
            yield node.name, _module(node)


def _module(node: NodeProto) -> str:
    """Name of the module, from that of its weight or bias: the weights of an INT8 file have lost theirs."""
    found = (re.fullmatch(r"(.+)\.(?:weight|weight_bias|bias)", name) for name in node.input[1:])
    return next((match[1] for match in found if match), node.name)
