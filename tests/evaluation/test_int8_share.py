import sys

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from retinaface.errors import InputError
from retinaface.evaluation.int8_share import convolutions_in_int8

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is optional: pip install openvino")
    return request.param


def quantized_convolution(model):
    """A convolution in INT8, and its module."""
    name = "backbone.stage2.1.3"
    return next(node for node in model.graph.node if f"{name}.bias" in node.input), name


def test_all_in_float(onnx_files, runtime):
    share = convolutions_in_int8(onnx_files["float"], runtime)
    assert (share.int8, share.total, len(share.float_names)) == (0, 56, 56)
    assert share.float_names[0] == "backbone.stage1.0.0"
    assert share.float_names[-1] == "landmark_heads.2"


def test_what_is_kept_in_float_is_named(onnx_files, runtime):
    share = convolutions_in_int8(onnx_files["int8"], runtime)
    heads = [f"{kind}_heads.{level}" for kind in ("class", "box", "landmark") for level in range(3)]
    pyramid = [f"fpn.lateral.{level}.0" for level in range(3)] + ["fpn.merge.1.0", "fpn.merge.0.0"]
    assert (share.int8, share.total) == (41, 56)
    assert sorted(share.float_names) == sorted(["backbone.stage1.0.0", *pyramid, *heads])


def test_what_cannot_be_fused_counts_as_float_whatever_the_file_says(onnx_files, tmp_path):
    """A convolution whose output passes through another operation before it is rounded."""
    model = onnx.load(onnx_files["int8"])
    convolution, module = quantized_convolution(model)
    position = list(model.graph.node).index(convolution) + 1
    model.graph.node.insert(position, helper.make_node("Sin", ["before"], [convolution.output[0]]))
    convolution.output[0] = "before"
    onnx.save(model, tmp_path / "unfused.onnx")
    share = convolutions_in_int8(tmp_path / "unfused.onnx")
    assert (share.int8, share.total, len(share.float_names)) == (40, 56, 16)
    assert module in share.float_names


def test_what_the_runtime_rounds_on_its_own_counts_as_int8(onnx_files, tmp_path):
    """ONNX Runtime rounds float weights between a quantized input and a quantized output."""
    model = onnx.load(onnx_files["int8"])
    convolution, module = quantized_convolution(model)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rounding = next(node for node in model.graph.node if node.output[0] == convolution.input[1])
    integers, scale = arrays[rounding.input[0]], arrays[rounding.input[1]]
    weight = integers.astype(np.float32) * scale[:, None, None, None]
    model.graph.initializer.append(numpy_helper.from_array(weight, f"{module}.weight"))
    convolution.input[1] = f"{module}.weight"
    model.graph.node.remove(rounding)
    onnx.save(model, tmp_path / "float_weights.onnx")
    share = convolutions_in_int8(tmp_path / "float_weights.onnx")
    assert (share.int8, share.total) == (41, 56)
    assert module not in share.float_names


def test_a_convolution_without_a_module_goes_by_its_own_name(tmp_path):
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], name="mine")], "g", *map(list, zip(values)))
    graph.initializer.append(weight)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "other.onnx"
    )
    assert convolutions_in_int8(tmp_path / "other.onnx").float_names == ("mine",)


def test_files_that_cannot_be_read(tmp_path, runtime):
    with pytest.raises(InputError, match=r"absent\.onnx: no such file"):
        convolutions_in_int8(tmp_path / "absent.onnx", runtime)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match=r"text\.onnx: .* cannot load it"):
        convolutions_in_int8(tmp_path / "text.onnx", runtime)


def test_openvino_is_asked_for_where_it_is_absent(onnx_files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="pip install openvino"):
        convolutions_in_int8(onnx_files["float"], "openvino")
