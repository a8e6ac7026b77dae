import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.delivery.export import export_onnx
from retinaface.delivery.tensorrt import require_tensorrt_form


@pytest.fixture(scope="module")
def content(build_network, tmp_path_factory):
    """The file of a small network for TensorRT, with one convolution in float."""
    network = build_network(channels=16, strides=(32,), anchor_sizes=((16,),))
    settings = QuantizationSettings(keep_float=("class_heads",), averaging=0.5, backend="tensorrt")
    prepared = prepare_for_training(network, settings).train()
    with torch.no_grad():
        prepared(torch.rand(2, 3, 64, 96) * 255 - 110)
    path = tmp_path_factory.mktemp("tensorrt") / "int8.onnx"
    export_onnx(prepared.eval(), path)
    return path.read_bytes()


@pytest.fixture
def model(content):
    """To break."""
    return onnx.ModelProto.FromString(content)


def first(model, kind, position=0):
    return [node for node in model.graph.node if node.op_type == kind][position]


def initializer(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def set_zero_point(model, node, array):
    model.graph.initializer.append(numpy_helper.from_array(array, "other zero point"))
    node.input[2] = "other zero point"


def weight_of(model, convolution):
    return next(node for node in model.graph.node if node.output[0] == convolution.input[1])


def quantized(model):
    """A convolution in INT8."""
    outputs = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return next(node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in outputs)


def test_a_network_prepared_for_tensorrt_is_in_its_form(model):
    require_tensorrt_form(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    in_float = [node for node in convolutions if node.input[1] == "class_heads.0.weight"]
    assert len(in_float) == 1 < len(convolutions)


@pytest.mark.parametrize("kind", ["QuantizeLinear", "DequantizeLinear"])
@pytest.mark.parametrize("position", [0, -1])
def test_zero_points_must_be_int8_zeros(model, kind, position):
    node = first(model, kind, position)
    shape = initializer(model, node.input[2]).dims
    set_zero_point(model, node, np.full(shape, 3, np.int8))
    with pytest.raises(RuntimeError, match=rf"form: {kind} {node.name} has a zero point other than 0"):
        require_tensorrt_form(model)


@pytest.mark.parametrize("kind", ["QuantizeLinear", "DequantizeLinear"])
def test_zero_points_of_other_types(model, kind):
    node = first(model, kind)
    set_zero_point(model, node, np.zeros(initializer(model, node.input[2]).dims, np.uint8))
    with pytest.raises(RuntimeError, match=rf"{node.name} has no constant int8 zero point"):
        require_tensorrt_form(model)


def test_a_missing_zero_point_would_be_unsigned(model):
    node = first(model, "QuantizeLinear")
    del node.input[2]
    with pytest.raises(RuntimeError, match=rf"{node.name} has no constant int8 zero point"):
        require_tensorrt_form(model)


@pytest.mark.parametrize("scales", ["one", "axis"])
def test_weights_have_a_scale_for_each_output_channel(model, scales):
    convolution = quantized(model)
    weight = weight_of(model, convolution)
    if scales == "one":
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "one scale"))
        weight.input[1] = "one scale"
    else:
        del weight.attribute[:]  # axis 1 then
    with pytest.raises(RuntimeError, match=rf"Conv {convolution.name} has weights without one scale for each"):
        require_tensorrt_form(model)


def test_the_input_of_a_quantized_convolution_is_quantized_too(model):
    convolution = quantized(model)
    source = next(node for node in model.graph.node if node.output[0] == convolution.input[0])
    source.op_type = "Identity"
    with pytest.raises(RuntimeError, match=rf"Conv {convolution.name} has quantized weights, but an input in float"):
        require_tensorrt_form(model)
    convolution.input[0] = "images"
    with pytest.raises(RuntimeError, match=rf"Conv {convolution.name} has quantized weights, but an input in float"):
        require_tensorrt_form(model)


def test_weights_that_are_computed(model):
    convolution = quantized(model)
    model.graph.node.insert(0, helper.make_node("Abs", [convolution.input[1]], ["computed"]))
    convolution.input[1] = "computed"
    with pytest.raises(RuntimeError, match=rf"Conv {convolution.name} has weights that are neither"):
        require_tensorrt_form(model)


def test_batch_norms_are_folded(model):
    model.graph.node.append(
        helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["normed"], name="norm", epsilon=1e-5)
    )
    with pytest.raises(RuntimeError, match="BatchNormalization norm is not folded"):
        require_tensorrt_form(model)


def test_int8_means_int8(model):
    assert {
        initializer(model, node.input[2]).data_type for node in model.graph.node if "quantizeL" in node.op_type
    } == {TensorProto.INT8}
