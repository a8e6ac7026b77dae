"""Writes ONNX files and checks them against torch."""

import json
import logging
import tempfile
import warnings
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from retinaface.compression.quantization import FakeQuantizedRetinaFace, convert
from retinaface.compression.structure import Network
from retinaface.cpus import saturates_int8
from retinaface.data.annotations import MEAN_BGR
from retinaface.delivery.session import open_session
from retinaface.delivery.tensorrt import require_tensorrt_form
from retinaface.errors import InputError
from retinaface.model.network import DYNAMIC_SHAPE, Outputs, export_example

METADATA_KEY = "retinaface_slim"
INPUT_NAME = "images"
OUTPUT_NAMES = ("class_logits", "box_deltas", "landmark_deltas")

# Largest difference between ONNX Runtime and torch. Float: of any number, relative to the spread of torch's output.
# INT8: the mean, relative to what the rounding to INT8 costs: a value that falls on the other side of a rounding step
# moves everything after it. On the public mobilenet0.25, on photos and noise, it was 0 to .3.
_FLOAT_TOLERANCE = 1e-3
_INT8_TOLERANCE = 0.75


def export_onnx(network: Network, path: Path) -> None:
    """Writes a network as ONNX, with dynamic batch, height and width (33 pixels or more), and checks the file.

    Input ``images (B, 3, H, W)`` float32 BGR minus the mean colour, as from
    :func:`retinaface.model.network.normalize`; outputs ``class_logits``, ``box_deltas`` and ``landmark_deltas``.
    Anchors and mean are in the file's metadata, with the precision, and for INT8 the backend and the bits of the
    weights. A fake-quantized network is written with INT8 weights between QuantizeLinear and DequantizeLinear nodes.

    Args:
        network: Float or fake-quantized; left as it was.
        path: File to write; appears only when complete and checked.

    Raises:
        InputError: The folder cannot be written to.
        RuntimeError: ONNX Runtime's outputs differ from torch's, or the file for TensorRT is not in its form; a fault
            of this project.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # made first: the export takes a while
            graph = convert(network) if isinstance(network, FakeQuantizedRetinaFace) else deepcopy(network).cpu().eval()
            unchecked = Path(folder) / path.name
            model = _with_metadata(_to_onnx(graph), network)
            if isinstance(network, FakeQuantizedRetinaFace) and network.settings.backend == "tensorrt":
                require_tensorrt_form(model)
            onnx.save(model, unchecked)
            _check_outputs(graph, network, unchecked)
            unchecked.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error


def _with_metadata(model: onnx.ModelProto, network: Network) -> onnx.ModelProto:
    facts: dict[str, Any] = {"network": asdict(network.config), "mean_bgr": MEAN_BGR, "precision": "float32"}
    if isinstance(network, FakeQuantizedRetinaFace):
        settings = network.settings
        facts |= {"precision": "int8", "backend": settings.backend, "weight_bits": settings.weight_bits}
    entry = model.metadata_props.add()
    entry.key = METADATA_KEY
    entry.value = json.dumps(facts)
    onnx.checker.check_model(model, full_check=True)
    return model


def _to_onnx(graph: nn.Module) -> onnx.ModelProto:
    # The exporter reports its progress and its fallbacks at length; what counts is checked afterwards.
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (export_example(),),
                dynamo=True,
                dynamic_shapes=(DYNAMIC_SHAPE,),
                input_names=[INPUT_NAME],
                output_names=list(OUTPUT_NAMES),
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    # Stack traces of the export: half of a small model's file, and nobody else's business.
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.value_info[:]
    _part_zero_points(model.graph)
    return model


def _part_zero_points(graph: onnx.GraphProto) -> None:
    """Gives each convolution's weights zero points of their own.

    The exporter lets those of equal length share one tensor. ONNX Runtime's exact mode for CPUs without INT8 dot
    products (``session.x64quantprecision``) makes a new tensor of each, and does not load a file in which two are one.
    """
    constants = {constant.name: constant for constant in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants or len(node.input) < 3:
            continue
        if node.input[2] in taken:
            own = graph.initializer.add()
            own.CopyFrom(constants[node.input[2]])
            own.name = f"{node.input[0]}_zero_point"
            node.input[2] = own.name
        taken.add(node.input[2])


def _check_outputs(graph: nn.Module, network: Network, path: Path) -> None:
    # Where sums saturate the file is not to blame: ONNX Runtime can be told to compute exactly there.
    session = open_session(path, entries={"session.x64quantprecision": "1"} if saturates_int8() else None)
    quantized = deepcopy(network).cpu().eval() if isinstance(network, FakeQuantizedRetinaFace) else None
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 3, 64, 96), (2, 3, 160, 120)):
        images = torch.rand(shape, generator=generator) * 255 - 110
        with torch.no_grad():
            wanted: tuple[Tensor, ...] = graph(images)
        found = [torch.from_numpy(output) for output in session.run(list(OUTPUT_NAMES), {INPUT_NAME: images.numpy()})]
        if quantized is not None:
            with torch.no_grad(), quantized.without_rounding():
                exact: Outputs = quantized(images)
            cost = [(a - b).abs().mean() for a, b in zip(wanted, exact, strict=True)]
            # An output that no rounding reaches costs nothing, and differs as in float.
            allowed = [
                torch.maximum(_INT8_TOLERANCE * each, _FLOAT_TOLERANCE * output.std())
                for each, output in zip(cost, wanted, strict=True)
            ]
            differences = [(a - b).abs().mean() for a, b in zip(wanted, found, strict=True)]
        else:
            allowed = [_FLOAT_TOLERANCE * (output.std() + 1e-6) for output in wanted]
            differences = [(a - b).abs().max() for a, b in zip(wanted, found, strict=True)]
        for name, difference, most in zip(OUTPUT_NAMES, differences, allowed, strict=True):
            if not difference <= most:
                raise RuntimeError(
                    f"{path.name}: {name} of ONNX Runtime differs from torch by {difference:.2g}; at most {most:.2g} "
                    "was expected"
                )
