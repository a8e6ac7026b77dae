import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnxruntime import InferenceSession

from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.delivery.export import export_onnx
from retinaface.delivery.int8_layout import use_channels_last, widen_float_layers
from retinaface.delivery.onnx_forms import OnnxSettings

HEADER = '<ir_version: 10, opset_import: ["": 18]>'
UPSAMPLING = """
upsampling (uint8[batch, channels, h, w] coarser, float[batch, channels, height, width] finer)
    => (float[batch, channels, height, width] found)
<float scale = {0.5}, uint8 zero = {3}>
{
    values = DequantizeLinear (coarser, scale, zero)
    size = Shape (finer)
    wide = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (
        values, , , size
    )
    rounded = QuantizeLinear (wide, scale, zero)
    found = DequantizeLinear (rounded, scale, zero)
}
"""
ROUNDING = """
rounding (float[batch, 2, height, width] image) => (float[batch, 3, height, width] found)
<float scale = {0.05}, uint8 zero = {100}, float[3, 2, 1, 1] weight = {0.5, -0.2, 0.1, 0.9, -1.0, 0.3}>
{
    sums = Conv (image, weight)
    map = LeakyRelu <alpha = 0.1> (sums)
    rounded = QuantizeLinear (map, scale, zero)
    found = DequantizeLinear (rounded, scale, zero)
}
"""
NARROW = """
narrow (float[batch, 3, height, width] image) => (float[batch, 5, height, width] found)
<float[2, 3, 1, 1] first = {0.5, -0.2, 0.1, 0.9, -1.0, 0.3}, float[2] bias = {0.5, -0.25},
 float[2, 1, 1, 2] depthwise = {0.3, 0.2, -0.7, 0.4}, float[2] other_bias = {0.1, 0.6},
 float[5, 2, 1, 1] last = {0.5, -0.2, 0.1, 0.9, -1.0, 0.3, 0.7, 0.8, -0.4, 0.6}>
{
    sums = Conv (image, first, bias)
    map = LeakyRelu <alpha = 0.1> (sums)
    spread = Conv <group = 2, pads = [0, 0, 0, 1]> (map, depthwise, other_bias)
    cut = Relu (spread)
    found = Conv (cut, last)
}
"""


def parse(text):
    model = onnx.parser.parse_model(HEADER + text)
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def kinds(graph):
    return [node.op_type for node in graph.node]


def run(model, **inputs):
    onnx.checker.check_model(model, full_check=True)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def noise(*shape):
    return np.random.default_rng(0).uniform(-5, 5, shape).astype(np.float32)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (5, 8), (20, 33), (40, 40)])
def test_copies_are_nearest_neighbours(size):
    """To any size of a finer level, compared with the Resize itself."""
    model = parse(UPSAMPLING)
    coarser = np.random.default_rng(0).integers(0, 256, (2, 3, *(-(-side // 2) for side in size)), dtype=np.uint8)
    finer = noise(2, 3, *size)
    wanted = run(model, coarser=coarser, finer=finer)
    use_channels_last(model.graph)
    assert "Resize" not in kinds(model.graph)
    np.testing.assert_array_equal(run(model, coarser=coarser, finer=finer), wanted)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("QuantizeLinear (wide, scale, zero)", "QuantizeLinear (wide, other_scale, zero)"),
        ("DequantizeLinear (coarser, scale, zero)", "Cast <to = 1> (coarser)"),
        ("found = DequantizeLinear (rounded, scale, zero)", "part = DequantizeLinear (rounded, scale, zero)\n"
                                                            "found = Sub (part, wide)"),
    ],
    ids=["other steps", "float", "two users"],
)  # fmt: skip
def test_any_other_resize_stays(old, new):
    text = UPSAMPLING.replace("uint8 zero", "float other_scale = {0.25}, uint8 zero")
    assert old in text
    model = parse(text.replace(old, new))
    before = model.SerializeToString()
    use_channels_last(model.graph)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("activation", ["map = LeakyRelu <alpha = 0.1> (sums)", "map = Relu (sums)", ""])
def test_a_map_is_turned_before_it_is_rounded(activation):
    model = parse(ROUNDING.replace("map = LeakyRelu <alpha = 0.1> (sums)", activation))
    if not activation:
        model.graph.node[1].input[0] = "sums"
    image = noise(2, 2, 5, 7)
    wanted = run(model, image=image)
    use_channels_last(model.graph)
    assert "QuantizeLinear" not in kinds(model.graph)[: kinds(model.graph).index("Reshape")]
    np.testing.assert_array_equal(run(model, image=image), wanted)


def test_between_int8_convolutions_nothing_is_turned():
    int8 = ROUNDING.replace("float[3, 2, 1, 1] weight = {0.5, -0.2, 0.1, 0.9, -1.0, 0.3}",
                            "float step = {0.1}, int8[3, 2, 1, 1] whole = {5, -2, 1, 9, -10, 3}")  # fmt: skip
    model = parse(int8.replace("{\n", "{\n    weight = DequantizeLinear (whole, step)\n"))
    before = model.SerializeToString()
    use_channels_last(model.graph)
    assert model.SerializeToString() == before


def test_narrow_float_layers_are_filled_with_zeros():
    model = parse(NARROW)
    image = noise(2, 3, 5, 7)
    wanted = run(model, image=image)
    widen_float_layers(model.graph, 8)
    shapes = {constant.name: tuple(constant.dims) for constant in model.graph.initializer}
    assert shapes == {
        "first": (8, 3, 1, 1), "bias": (8,), "depthwise": (8, 1, 1, 2), "other_bias": (8,), "last": (5, 8, 1, 1)
    }  # fmt: skip
    np.testing.assert_allclose(run(model, image=image), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "least"),
    [
        ("", "", 2),
        ("cut = Relu (spread)", "cut = Sigmoid (spread)", 8),
        ("cut = Relu (spread)", "whole = Relu (spread)\ncut = Add (whole, spread)", 8),
        ("cut = Relu (spread)", "cut = Relu (spread)\nfor_another = Relu (spread)", 8),
        ("(map, depthwise, other_bias)", "(map, depthwise, bias)", 8),
        ("found = Conv (cut, last)", "found = Conv (cut, last)\nfor_another = Conv (image, last)", 8),
        ("float[5, 2, 1, 1] last", "float[1, 10, 1, 1] last", 16),
        ("width] found)", "width] found, float[batch, 2, height, width] map)", 8),
        ("sums = Conv (image, first, bias)", "sums = Identity (image)", 8),
        ("cut = Relu (spread)", "whole = QuantizeLinear (spread, one, zero)\ncut = DequantizeLinear (whole, one, zero)",
         8),
    ],
    ids=["wide enough", "not zero for zero", "added", "two users", "shared weights", "shared last weights",
         "more channels than groups", "output", "image", "INT8"],
)  # fmt: skip
def test_any_other_layer_stays(old, new, least):
    text = NARROW.replace("<float[2, 3", "<float one = {1.0}, uint8 zero = {9}, float[2, 3")
    assert old in text
    model = parse(text.replace(old, new))
    before = model.SerializeToString()
    widen_float_layers(model.graph, least)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("backend", "resizes", "channels", "settings"),
    [("onnxruntime", 0, 16, OnnxSettings()), ("onnxruntime", 0, 16, OnnxSettings(size=(97, 133), batch=2)),
     ("onnxruntime", 0, 8, OnnxSettings(least_channels=8)), ("openvino", 1, 8, OnnxSettings())],
)  # fmt: skip
def test_files_for_onnx_runtime_alone_are_rewritten(build_network, tmp_path, backend, resizes, channels, settings):
    prepared = prepare_for_training(
        build_network(channels=16, strides=(16, 32), anchor_sizes=((16,), (64,))),
        QuantizationSettings(keep_float=("backbone.stage1",), averaging=0.5, backend=backend),
    ).train()
    with torch.no_grad():
        prepared(torch.rand(2, 3, 64, 96) * 255 - 110)
    export_onnx(prepared.eval(), tmp_path / "int8.onnx", settings)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert kinds(graph).count("Resize") == resizes
    # Flat, on its way from the first stage.
    assert any("layout.flat" in node.input for node in graph.node) == (backend == "onnxruntime")
    shapes = {constant.name: tuple(constant.dims) for constant in graph.initializer}
    weights = [shapes[node.input[1]] for node in graph.node if node.op_type == "Conv" and node.input[1] in shapes]
    first, depthwise, last = weights[:3]
    assert (first[0], depthwise[0], last[1]) == (channels,) * 3
