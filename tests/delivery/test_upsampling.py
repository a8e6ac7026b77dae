import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.delivery.export import export_onnx
from retinaface.delivery.upsampling import upsample_by_copying


@pytest.fixture
def model():
    """An 8-bit map is upsampled to the size of another; the scale after it can be changed."""
    steps = ("scale", "zero")
    nodes = [
        helper.make_node("DequantizeLinear", ["coarser", *steps], ["values"], "dequantize"),
        helper.make_node("Shape", ["finer"], ["size"], "shape"),
        helper.make_node(
            "Resize",
            ["values", "", "", "size"],
            ["wide"],
            "upsample",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        helper.make_node("QuantizeLinear", ["wide", *steps], ["rounded"], "quantize"),
        helper.make_node("DequantizeLinear", ["rounded", *steps], ["found"], "dequantize again"),
    ]
    shape = ["batch", "channels", "height", "width"]
    graph = helper.make_graph(
        nodes,
        "upsampling",
        [
            helper.make_tensor_value_info("coarser", TensorProto.UINT8, shape),
            helper.make_tensor_value_info("finer", TensorProto.FLOAT, ["batch", "channels", "rows", "columns"]),
        ],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, ["batch", "channels", "rows", "columns"])],
        [
            numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
            numpy_helper.from_array(np.array(3, np.uint8), "zero"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def kinds(model):
    return [node.op_type for node in model.graph.node]


def run(model, **inputs):
    onnx.checker.check_model(model, full_check=True)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (5, 8), (20, 33), (40, 40)])
def test_copies_are_nearest_neighbours(model, size):
    """To any size of a finer level, compared with the Resize itself."""
    coarser = np.random.default_rng(0).integers(0, 256, (2, 3, *(-(-side // 2) for side in size)), dtype=np.uint8)
    finer = np.zeros((2, 3, *size), np.float32)
    wanted = run(model, coarser=coarser, finer=finer)
    upsample_by_copying(model.graph)
    assert "Resize" not in kinds(model)
    np.testing.assert_array_equal(run(model, coarser=coarser, finer=finer), wanted)


@pytest.mark.parametrize("change", ["other scale", "float", "two users"])
def test_any_other_resize_stays(model, change):
    dequantize, _, _, quantize, _ = model.graph.node
    if change == "other scale":
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.25, np.float32), "other"))
        quantize.input[1] = "other"
    elif change == "float":
        dequantize.CopyFrom(helper.make_node("Cast", ["coarser"], ["values"], to=TensorProto.FLOAT))
    else:
        model.graph.node.append(helper.make_node("Neg", ["wide"], ["negative"]))
    before = model.SerializeToString()
    upsample_by_copying(model.graph)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(("backend", "resizes"), [("onnxruntime", 0), ("openvino", 1)])
def test_files_for_onnx_runtime_have_no_quantized_resize(build_network, tmp_path, backend, resizes):
    prepared = prepare_for_training(
        build_network(channels=16, strides=(16, 32), anchor_sizes=((16,), (64,))),
        QuantizationSettings(averaging=0.5, backend=backend),
    ).train()
    with torch.no_grad():
        prepared(torch.rand(2, 3, 64, 96) * 255 - 110)
    export_onnx(prepared.eval(), tmp_path / "int8.onnx")
    assert kinds(onnx.load(tmp_path / "int8.onnx")).count("Resize") == resizes
