"""Writes ONNX files and checks them against torch."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from retinaface import __version__
from retinaface.compression.quantization import FakeQuantizedRetinaFace, convert
from retinaface.compression.structure import Network
from retinaface.cpus import saturates_int8
from retinaface.data.annotations import MEAN_BGR, read_image
from retinaface.delivery.int8_layout import use_channels_last, widen_float_layers
from retinaface.delivery.onnx_forms import KEEP, RAW_NAMES, TRANSLATIONS, OnnxForm, OnnxSettings, decode
from retinaface.delivery.session import open_session
from retinaface.delivery.tensorrt import require_tensorrt_form
from retinaface.errors import InputError
from retinaface.model.boxes import VARIANCES
from retinaface.model.checkpoints import read_torch_file
from retinaface.model.network import DYNAMIC_SHAPE, Outputs, export_example, normalize, pad_small
from retinaface.whole_file import whole_file

METADATA_KEY = "retinaface_slim"
INPUT_NAME = "images"
OUTPUT_NAMES = RAW_NAMES
OPSET = 18
"""Version of ONNX's operations that files are written in: the one that torch's exporter is made for."""

_LICENCE = "Apache-2.0"

_SHORT_NAMES = {
    "network.": "",
    "weight_bias": "bias",
    "node_": "",
    "_frozen_param": "weight",
    "_zero_point": "_zero",
    "dequantize_per_channel": "dqc",
    "dequantize_per_tensor": "dq",
    "quantize_per_tensor": "q",
    "upsample_nearest2d": "upsample",
    "_unsafe_view": "_view",
    "conv2d": "conv",
    "leaky_relu": "leaky",
}

# What ONNX takes attributes of operations to be where nothing is said.
_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "Conv": {"auto_pad": b"NOTSET", "dilations": [1, 1], "group": 1, "pads": [0] * 4, "strides": [1, 1]},
    "QuantizeLinear": {"axis": 1},
    "DequantizeLinear": {"axis": 1},
    "Reshape": {"allowzero": 0},
}

# Largest difference between ONNX Runtime and torch. Float: of any number, relative to the spread of torch's output.
# INT8: the mean over all pictures, relative to what the rounding to INT8 costs: a value that falls on the other side of
# a rounding step moves everything after it. On the public mobilenet0.25, on photos and noise, it was 0 to .3. In a
# network that has hardly been trained such a value can move all that comes of one picture, but not by more than both
# roundings cost together.
_FLOAT_TOLERANCE = 1e-3
_INT8_TOLERANCE = 0.75
_INT8_TOLERANCE_OF_ONE = 2.0

# Pictures of noise of each size for INT8: the fewer, the more a single value on the other side of a step decides.
_INT8_NOISES = 4

# Largest difference of what is computed from the same raw outputs: of a score or pixel, and relative to the number.
_STEP_TOLERANCE = (1e-3, 1e-4)


def export_onnx(
    network: Network,
    path: Path,
    settings: OnnxSettings | None = None,
    photos: Sequence[Path] = (),
    trained_on: str | None = None,
    average_precision: Mapping[str, float] | None = None,
) -> None:
    """Writes a network as ONNX in opset 18, and checks the file.

    Input is ``images``; what it holds and the outputs are by the settings: by default ``(B, 3, H, W)`` float32 BGR
    minus the mean colour, as from :func:`retinaface.model.network.normalize`, any batch, height and width (33 pixels or
    more), and ``class_logits``, ``box_deltas`` and ``landmark_deltas``. A fake-quantized network is written with INT8
    weights between QuantizeLinear and DequantizeLinear nodes.

    The metadata entry ``retinaface_slim`` is a JSON object: project ``version``, ``licence`` of the project's code,
    ``opset``, ``form``, ``input`` (what to feed), ``size``, ``batch``, the ``network`` with its anchors and strides,
    ``variances``, ``mean_bgr``, ``precision``; for INT8 ``backend`` and ``weight_bits``; for ``end_to_end`` the
    thresholds; ``trained_on`` and ``average_precision`` where they are known.

    The file is right when ONNX's checker and strict shape inference pass, ONNX Runtime's raw outputs are torch's, and
    every later step gives what torch makes of the numbers that the step before gave in ONNX Runtime. As no face may be
    found in what it is compared on, the suppression is compared on all anchors of the noise as well.

    Args:
        network: Float or fake-quantized; left as it was.
        path: File to write; appears only when complete and checked.
        settings: Form, input and size; by default those above.
        photos: Photos to compare on, besides noise; at their own size where the file takes any.
        trained_on: What the network was trained on.
        average_precision: What it reached there, subset to value.

    Raises:
        InputError: The folder cannot be written to, or a photo cannot be read.
        RuntimeError: ONNX Runtime's outputs differ from torch's, or the file for TensorRT is not in its form; a fault
            of this project.
    """
    settings = settings or OnnxSettings()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unchecked:
            unchecked.touch()  # first, as the export takes a while
            graph = convert(network) if isinstance(network, FakeQuantizedRetinaFace) else deepcopy(network).cpu().eval()
            form = OnnxForm(graph, network.config, settings)
            model = _to_onnx(_with_folded_batch_norms(form))
            facts = {"opset": OPSET, **file_facts(network, settings)}
            facts |= _known(trained_on=trained_on, average_precision=average_precision)
            onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(facts)})
            backend = network.settings.backend if isinstance(network, FakeQuantizedRetinaFace) else None
            if backend == "onnxruntime":
                use_channels_last(model.graph)
                widen_float_layers(model.graph, settings.least_channels)
            if backend == "tensorrt":
                require_tensorrt_form(model)
            if settings.form == "end_to_end":
                onnx.save(_without_score_threshold(model), unchecked)
                every_anchor = OnnxForm(graph, network.config, replace(settings, score_threshold=0))
                _check_suppression(every_anchor, unchecked, path.name)
            onnx.save(model, unchecked)
            _check_outputs(form, network, unchecked, path.name, photos)
            _keep_outputs(model.graph, settings.output_names)
            onnx.checker.check_model(model, full_check=True)
            onnx.save(model, unchecked)
            open_session(unchecked)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another file") from error


def file_facts(network: Network, settings: OnnxSettings) -> dict[str, Any]:
    """What a file says of itself, as plain values; see :func:`export_onnx`."""
    facts: dict[str, Any] = {
        "version": __version__,
        "licence": _LICENCE,
        "form": settings.form,
        "input": {
            "name": INPUT_NAME,
            "type": "float32" if settings.input == "normalized" else "uint8",
            "layout": "batch, channel, height, width" if settings.in_planes else "batch, height, width, channel",
            "colours": "RGB" if settings.input == "rgb" else "BGR",
            "range": [0, 255],
            "subtract": MEAN_BGR if settings.input == "normalized" else [0, 0, 0],
        },
        "size": settings.size,
        "batch": settings.batch,
        "network": asdict(network.config),
        "variances": VARIANCES,
        "mean_bgr": MEAN_BGR,
        "precision": "float32",
    }
    if isinstance(network, FakeQuantizedRetinaFace):
        quantization = network.settings
        facts |= {"precision": "int8", "backend": quantization.backend, "weight_bits": quantization.weight_bits}
    if settings.form == "end_to_end":
        facts |= {"score_threshold": settings.score_threshold, "nms_threshold": settings.nms_threshold, "keep": KEEP}
    return facts


def recorded_facts(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its training: ``trained_on`` and ``average_precision``, where they are known.

    Raises:
        InputError: The file cannot be read.
    """
    content = read_torch_file(checkpoint)
    facts = content if isinstance(content, Mapping) else {}
    return {name: facts[name] for name in ("trained_on", "average_precision") if facts.get(name)}


def _known(**facts: object) -> dict[str, object]:
    return {name: fact for name, fact in facts.items() if fact is not None}


def _with_folded_batch_norms(form: OnnxForm) -> OnnxForm:
    """Copy in which each convolution and the batch norm that is registered behind it are one convolution.

    The exporter would end with the same graph, after 1.6 times as long: what it traces are mostly batch norms and
    operations in place. That they are called in this order is what comparing the file's outputs shows.
    """
    form = deepcopy(form)
    for module in form.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = False
        for (name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, _BatchNorm):  # a SyncBatchNorm too
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, nn.Identity())
    return form


def _to_onnx(form: OnnxForm) -> onnx.ModelProto:
    """Exports with the outputs of every step."""
    example, open_axes = _example(form.settings)
    # The exporter reports its progress and its fallbacks at length; what counts is checked afterwards.
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript.optimizer")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                form,
                (example,),
                dynamo=True,
                dynamic_shapes=(open_axes,),
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=list(form.settings.step_names),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    # Stack traces and records of the export: half of a small model's file, and nobody else's business.
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    _shorten_names(model.graph)
    _drop_defaults(model.graph)
    _part_zero_points(model.graph)
    _name_axes(model.graph, form.settings)
    return model


def _example(settings: OnnxSettings) -> tuple[Tensor, dict[int, Any]]:
    """An input to trace with, and those of its axes that the file leaves open."""
    batch, _, *size = export_example().shape
    example = settings.feed(torch.zeros(settings.batch or batch, 3, *(settings.size or size), dtype=torch.uint8))
    given = {0: settings.batch, 2: settings.size, 3: settings.size}
    open_axes = {axis: open_axis for axis, open_axis in DYNAMIC_SHAPE.items() if given[axis] is None}
    shift = 0 if settings.in_planes else -1  # of height and width, which then come before the channels
    return example, {axis + (shift if axis else 0): open_axis for axis, open_axis in open_axes.items()}


def _name_axes(graph: onnx.GraphProto, settings: OnnxSettings) -> None:
    """Gives the open axes of inputs and outputs the names that people know them by."""
    faces = settings.output_names if settings.form == "end_to_end" else ()
    taken = ("batch", "channels", "height", "width") if settings.in_planes else ("batch", "height", "width", "channels")
    axes = {INPUT_NAME: taken, **dict.fromkeys(faces, ("faces",))}
    for value in (*graph.input, *graph.output):
        names = axes.get(value.name, ("batch", "anchors"))
        for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            if axis.dim_param:
                axis.dim_param = name


def _without_score_threshold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy whose suppression takes every anchor."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        if node.op_type == "NonMaxSuppression":
            del node.input[4:]
    return changed


def _keep_outputs(graph: onnx.GraphProto, names: Sequence[str]) -> None:
    kept = [output for output in graph.output if output.name in names]
    del graph.output[:]
    graph.output.extend(kept)


def _shorten_names(graph: onnx.GraphProto) -> None:
    """Takes from names what is not needed to tell them apart: 4 % of the file of mobilenet0.25 in INT8.

    Weights get the names that they have in the network alone.
    """

    def shortened(name: str) -> str:
        for long, short in _SHORT_NAMES.items():
            name = name.replace(long, short)
        return name

    for constant in graph.initializer:
        constant.name = shortened(constant.name)
    for node in graph.node:
        node.name = shortened(node.name)
        node.input[:] = map(shortened, node.input)
        node.output[:] = map(shortened, node.output)


def _drop_defaults(graph: onnx.GraphProto) -> None:
    """Takes from operations what need not be said."""
    for node in graph.node:
        defaults = _DEFAULTS.get(node.op_type, {})
        said = [each for each in node.attribute if onnx.helper.get_attribute_value(each) != defaults.get(each.name)]
        del node.attribute[:]
        node.attribute.extend(said)


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
            own.name = f"{node.input[0]}_zero"
            node.input[2] = own.name
        taken.add(node.input[2])


def _check_outputs(form: OnnxForm, network: Network, path: Path, name: str, photos: Sequence[Path]) -> None:
    """Compares a file that gives the outputs of every step with torch."""
    session = _exact_session(path)
    quantized = deepcopy(network).cpu().eval() if isinstance(network, FakeQuantizedRetinaFace) else None
    compared: list[Tensor] = []
    for pictures in check_pictures(form.settings, photos, quantized is not None):
        images = normalize(pictures)
        raw, later = _run_steps(session, form.settings, pictures)
        with torch.no_grad():
            exact = None
            if quantized is not None:
                with quantized.without_rounding():
                    exact = quantized(images)
            compared.append(compare_outputs(form.network(images), exact, raw))
            _check_steps(form, raw, later, name, pictures)
    require_within(compared, quantized is not None, OUTPUT_NAMES, f"{name}: {{}} of ONNX Runtime")


def _check_suppression(form: OnnxForm, path: Path, name: str) -> None:
    """Compares a file that gives the outputs of every step, and takes every anchor for a face, with torch."""
    session = _exact_session(path)
    for pictures in check_pictures(form.settings, (), int8=False):
        _check_steps(form, *_run_steps(session, form.settings, pictures), name, pictures)


def _exact_session(path: Path) -> InferenceSession:
    # Where sums saturate the file is not to blame: ONNX Runtime can be told to compute exactly there.
    return open_session(path, entries={"session.x64quantprecision": "1"} if saturates_int8() else None)


def _run_steps(session: InferenceSession, settings: OnnxSettings, pictures: Tensor) -> tuple[Outputs, list[Tensor]]:
    """Raw outputs, and those of every later step."""
    arrays = session.run(list(settings.step_names), {INPUT_NAME: settings.feed(pictures).numpy()})
    class_logits, box_deltas, landmark_deltas, *later = map(torch.from_numpy, arrays)
    return (class_logits, box_deltas, landmark_deltas), later


def check_pictures(settings: OnnxSettings, photos: Sequence[Path], int8: bool) -> Iterator[Tensor]:
    """What to compare a file with torch on: noise in two sizes, and the photos.

    Args:
        settings: Of the file; where they fix a size, the photos are resized to it, and there is one size of noise.
        photos: Photos.
        int8: Whether the file is in INT8; then there is more noise, as the mean over the pictures counts.

    Yields:
        ``(B, 3, H, W)`` uint8 BGR.

    Raises:
        InputError: A photo cannot be read.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (settings.batch or batch, 3, *(settings.size or size)) for batch, size in ((1, (64, 96)), (2, (160, 120)))
    ]
    for shape in dict.fromkeys(shapes):
        for _ in range(_INT8_NOISES if int8 else 1):
            yield torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    for path in photos:
        photo = read_image(path)
        if settings.size is not None:
            photo = np.asarray(cv2.resize(photo, settings.size[::-1], interpolation=cv2.INTER_AREA), dtype=np.uint8)
        yield pad_small(torch.from_numpy(photo).permute(2, 0, 1).repeat(settings.batch or 1, 1, 1, 1))


def compare_outputs(wanted: Sequence[Tensor], exact: Sequence[Tensor] | None, found: Sequence[Tensor]) -> Tensor:
    """Compares what a runtime makes of a picture with what torch makes of it.

    Args:
        wanted: torch's outputs, for INT8 of the converted network.
        exact: For INT8: what they are without rounding; None for float.
        found: The runtime's outputs.

    Returns:
        ``(2, outputs)``: of each output, how much it differs, and how much it may.
    """
    floats = [_FLOAT_TOLERANCE * (output.std() + 1e-6) for output in wanted]
    if exact is None:
        differences, allowed = [(a - b).abs().max() for a, b in zip(wanted, found, strict=True)], floats
    else:
        differences = [(a - b).abs().mean() for a, b in zip(wanted, found, strict=True)]
        cost = [(a - b).abs().mean() for a, b in zip(wanted, exact, strict=True)]
        # An output that no rounding reaches costs nothing, and differs as in float.
        allowed = [torch.maximum(_INT8_TOLERANCE * each, least) for each, least in zip(cost, floats, strict=True)]
    return torch.stack([torch.stack(differences), torch.stack(allowed)])


def require_within(compared: Sequence[Tensor], int8: bool, names: Sequence[str], what: str) -> None:
    """Checks that outputs differ no more than they may.

    Args:
        compared: From :func:`compare_outputs`, for each picture.
        int8: Whether it is the mean over the pictures that may differ so much, and every one a little more: one value
            on the other side of a rounding step early in the network can move all that comes of one picture as much as
            rounding does; a fault moves every picture.
        names: Of the outputs.
        what: Says which output of what is compared, with ``{}`` for the output's name.

    Raises:
        RuntimeError: An output differs more; a fault of this project.
    """
    all_judged = list(compared)
    if int8:
        more = torch.tensor([[1], [_INT8_TOLERANCE_OF_ONE / _INT8_TOLERANCE]])
        all_judged = [torch.stack(all_judged).mean(dim=0), *(more * each for each in compared)]
    for judged in all_judged:
        for name, difference, most in zip(names, *judged.tolist(), strict=True):
            if not difference <= most:
                raise RuntimeError(
                    f"{what.format(name)} differs from torch by {difference:.2g}; at most {most:.2g} was expected"
                )


def _check_steps(form: OnnxForm, raw: Outputs, found: Sequence[Tensor], file: str, pictures: Tensor) -> None:
    """Compares each later step with what torch makes of the very numbers that the step before gave.

    So rounding in the network, which moves scores over a threshold and boxes over an overlap, is no matter here.
    """
    wanted: list[Tensor] = []
    if form.settings.form != "raw":
        wanted += decode(raw, pictures.shape[2], pictures.shape[3], form.config)
    if form.settings.form == "end_to_end":
        boxes, scores, landmarks = found[:3]
        wanted += form.select((boxes, scores, landmarks))
    absolute, relative = _STEP_TOLERANCE
    for name, ours, theirs in zip(form.settings.step_names[len(raw) :], found, wanted, strict=True):
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=relative, atol=absolute):
            raise RuntimeError(f"{file}: {name} of ONNX Runtime differs from what torch makes of the same raw outputs")
