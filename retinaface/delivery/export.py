"""Writes ONNX files and checks them against torch."""

import json
import logging
import tempfile
import warnings
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from retinaface.compression.quantization import FakeQuantizedRetinaFace, convert
from retinaface.compression.structure import Network
from retinaface.data.annotations import MEAN_BGR
from retinaface.errors import InputError
from retinaface.model.network import DYNAMIC_SHAPE, NetworkConfig, export_example

METADATA_KEY = "retinaface_slim"
INPUT_NAME = "images"
OUTPUT_NAMES = ("class_logits", "box_deltas", "landmark_deltas")

# Largest difference between ONNX Runtime and torch, relative to the spread of torch's output. Float: the largest of any
# number. INT8: the mean, since a value that falls on the other side of a rounding step moves everything after it.
_FLOAT_TOLERANCE = 1e-3
_INT8_TOLERANCE = 0.1


def export_onnx(network: Network, path: Path) -> None:
    """Writes a network as ONNX, with dynamic batch, height and width (33 pixels or more), and checks the file.

    Input ``images (B, 3, H, W)`` float32 BGR minus the mean colour, as from
    :func:`retinaface.model.network.normalize`; outputs ``class_logits``, ``box_deltas`` and ``landmark_deltas``.
    Anchors and mean are in the file's metadata. A fake-quantized network is written with INT8 weights between
    QuantizeLinear and DequantizeLinear nodes.

    Args:
        network: Float or fake-quantized; left as it was.
        path: File to write; appears only when complete and checked.

    Raises:
        InputError: The folder cannot be written to.
        RuntimeError: ONNX Runtime's outputs differ from torch's; a fault of this project.
    """
    quantized = isinstance(network, FakeQuantizedRetinaFace)
    tolerance = _INT8_TOLERANCE if quantized else _FLOAT_TOLERANCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # made first: the export takes a while
            graph = convert(network) if isinstance(network, FakeQuantizedRetinaFace) else deepcopy(network).cpu().eval()
            unchecked = Path(folder) / path.name
            onnx.save(_with_metadata(_to_onnx(graph), network.config, "int8" if quantized else "float32"), unchecked)
            _check_outputs(graph, unchecked, tolerance, quantized)
            unchecked.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error


def _with_metadata(model: onnx.ModelProto, config: NetworkConfig, precision: str) -> onnx.ModelProto:
    entry = model.metadata_props.add()
    entry.key = METADATA_KEY
    entry.value = json.dumps({"network": asdict(config), "mean_bgr": MEAN_BGR, "precision": precision})
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
    return model


def _check_outputs(graph: nn.Module, path: Path, tolerance: float, mean: bool) -> None:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 3, 64, 96), (2, 3, 160, 120)):
        images = torch.rand(shape, generator=generator) * 255 - 110
        with torch.no_grad():
            expected: tuple[Tensor, ...] = graph(images)
        actual: list[Any] = session.run(list(OUTPUT_NAMES), {INPUT_NAME: images.numpy()})
        for name, want, got in zip(OUTPUT_NAMES, expected, actual, strict=True):
            error = np.abs(want.numpy() - got)
            difference = (error.mean() if mean else error.max()) / (want.std().item() + 1e-6)
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{path.name}: {name} of ONNX Runtime differs from torch by {difference:.2g} of its spread; "
                    f"at most {tolerance} was expected"
                )
