"""Writes files for phones: programs for ExecuTorch, which XNNPACK runs on the CPU."""

import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from retinaface.compression.quantization import FakeQuantizedRetinaFace, convert
from retinaface.compression.structure import Network
from retinaface.delivery.export import METADATA_KEY, check_pictures, compare_outputs, file_facts, require_within
from retinaface.delivery.onnx_forms import OnnxForm, OnnxSettings
from retinaface.errors import InputError
from retinaface.whole_file import whole_file

USUAL_SIZE = (640, 640)
"""Height and width in pixels that a file takes where nothing else is said."""

_ZERO_OF_INT8 = 128  # what 0 of int8 is in uint8


class MobileForm(OnnxForm):
    """As the base class, with the outputs of the last step alone."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps what the settings say that the file takes to the outputs that they name."""
        return super().forward(images)[-len(self.settings.output_names) :]


def export_mobile(
    network: Network, path: Path, settings: OnnxSettings | None = None, photos: Sequence[Path] = ()
) -> None:
    """Writes a network as a program for ExecuTorch, and checks the file.

    Input and outputs are those of :func:`retinaface.delivery.export.export_onnx`, ``raw`` or ``decoded``, for one batch
    and one size: 1 and 640x640 where the settings name none. Whatever XNNPACK can run is left to it, the rest to
    ExecuTorch's own portable kernels. A fake-quantized network is written in INT8, with the same numbers as in ONNX.

    The program has a method ``retinaface_slim`` without arguments that gives a text: the JSON object of that name in
    the metadata of an ONNX file, without what only ONNX has or is not known here.

    The file is right when the runtime gives what torch gives: a float network to a thousandth of the spread of its
    outputs; one in INT8 within the rounding's own cost, as for ONNX.

    Args:
        network: Float or fake-quantized; left as it was.
        path: File to write; appears only when complete and checked.
        settings: Form, input, size and batch.
        photos: Photos to compare on, besides noise; resized to the file's size.

    Raises:
        InputError: ExecuTorch is not installed, the form is ``end_to_end``, for which it has no operation, the folder
            cannot be written to, or a photo cannot be read.
        RuntimeError: The runtime's outputs differ from torch's; a fault of this project.
    """
    settings = settings or OnnxSettings()
    if settings.form == "end_to_end":
        raise InputError(f"{path}: ExecuTorch has no suppression of boxes; choose the form raw or decoded")
    if importlib.util.find_spec("executorch") is None:
        raise InputError(f"{path}: ExecuTorch is not installed; run `pip install executorch`, or export to .onnx")
    settings = replace(settings, size=settings.size or USUAL_SIZE, batch=settings.batch or 1)
    form = MobileForm(_to_run(network), network.config, settings)
    program = _to_program(form, json.dumps(file_facts(network, settings)))
    _check_outputs(form, network, program, path.name, photos)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(program)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error


def _to_run(network: Network) -> nn.Module:
    """A float network itself, or the INT8 graph that a fake-quantized one becomes."""
    if isinstance(network, FakeQuantizedRetinaFace):
        return _with_int8_activations(convert(network))
    return deepcopy(network).cpu().eval()


def _with_int8_activations(graph: GraphModule) -> GraphModule:
    """Rounds activations to the same numbers, stored from -128 to 127: XNNPACK has no kernels for uint8."""
    for node in graph.graph.nodes:
        if "quantize_per_tensor" in str(node.target) and node.args[-1] is torch.uint8:
            values, scale, *limits, _ = node.args
            node.args = (values, scale, *(limit - _ZERO_OF_INT8 for limit in limits), torch.int8)
    graph.recompile()
    return graph


def _to_program(form: MobileForm, facts: str) -> bytes:
    exir = importlib.import_module("executorch.exir")
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    assert form.settings.size is not None
    example = form.settings.feed(torch.zeros(form.settings.batch or 1, 3, *form.settings.size, dtype=torch.uint8))
    with _quiet():
        program = exir.to_edge_transform_and_lower(
            torch.export.export(form, (example,)),
            partitioner=[xnnpack.XnnpackPartitioner()],
            constant_methods={METADATA_KEY: facts},
        ).to_executorch()
    content: bytes = program.buffer
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on its own doings; what counts is checked afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_outputs(form: MobileForm, network: Network, program: bytes, file: str, photos: Sequence[Path]) -> None:
    method = _load(program)
    copy = deepcopy(network).cpu().eval()
    int8 = isinstance(copy, FakeQuantizedRetinaFace)
    whole = MobileForm(copy, form.config, form.settings)
    compared: list[Tensor] = []
    for pictures in check_pictures(form.settings, photos, int8):
        images = form.settings.feed(pictures)
        with torch.no_grad():
            exact = None
            if isinstance(copy, FakeQuantizedRetinaFace):
                with copy.without_rounding():
                    exact = whole(images)
            compared.append(compare_outputs(form(images), exact, method.execute([images])))
    require_within(compared, int8, form.settings.output_names, f"{file}: {{}} of ExecuTorch")


def _load(program: bytes) -> Any:  # noqa: ANN401 (``executorch.runtime.Method``)
    runtime = importlib.import_module("executorch.runtime")
    return runtime.Runtime.get().load_program(program).load_method("forward")
