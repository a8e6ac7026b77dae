import math
import re
from collections import Counter
from copy import deepcopy

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver

from retinaface.compression.quantization import (
    QuantizationSettings,
    convert,
    prepare_for_training,
)
from retinaface.compression.quantizer import (
    ActivationFakeQuantize,
    PerChannelFakeQuantize,
    SymmetricActivationFakeQuantize,
    module_name,
)
from retinaface.delivery.export import export_onnx
from retinaface.errors import InputError
from retinaface.evaluation.int8_share import convolutions_in_int8

ALL = QuantizationSettings()


def pictures(seed, *shape):
    return torch.rand(*(shape or (2, 3, 64, 96)), generator=torch.Generator().manual_seed(seed)) * 255 - 110


def train(network, steps=3):
    """Shows the network pictures in training mode, without changing its parameters."""
    network.train()
    with torch.no_grad():
        for seed in range(steps):
            network(pictures(seed))
    return network.eval()


def run(network, images=None):
    with torch.no_grad():
        return network(pictures(99) if images is None else images)


@pytest.fixture(scope="module")
def float_network(build_network):
    return build_network(channels=16)


@pytest.fixture(scope="module")
def prepared(float_network):
    """Everything in INT8, LeakyReLU, ranges seen."""
    return train(prepare_for_training(float_network, ALL))


@pytest.fixture(scope="module")
def converted(prepared):
    return convert(prepared)


@pytest.fixture(scope="module")
def onnx_file(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "int8.onnx"
    export_onnx(prepared, path)
    return path


@pytest.fixture
def fresh(prepared):
    """A copy that a test may change."""
    return deepcopy(prepared)


def batch_norm_buffers(network):
    """Running statistics of every batch norm."""
    return {k: v.clone() for k, v in network.state_dict().items() if "running_" in k or "num_batches" in k}


def activation_ranges(network):
    observers = [m for m in network.modules() if isinstance(m, ActivationFakeQuantize)]
    assert observers
    return [(float(o.scale), int(o.zero_point), float(o.activation_post_process.max_val)) for o in observers]


def moved(before, after):
    return [key for key in before if not torch.equal(before[key], after[key])]


# What runs in INT8


def runtime_operations(path, folder):
    """Counts the operations that ONNX Runtime executes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def convolutions(network, outside=()):
    return sum(
        isinstance(module, nn.Conv2d) and not any(f"{name}.".startswith(f"{part}.") for part in outside)
        for name, module in network.named_modules()
    )


def test_every_convolution_runs_in_int8(float_network, onnx_file, tmp_path):
    operations = runtime_operations(onnx_file, tmp_path)
    assert operations["QLinearConv"] == convolutions(float_network) == 56
    assert operations["QLinearLeakyRelu"] == 38
    assert (operations["QLinearAdd"], operations["QLinearConcat"]) == (2, 3)
    assert not {"Conv", "FusedConv", "BatchNormalization", "LeakyRelu", "Relu"} & set(operations)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(onnx_file).graph.node}


def test_only_what_is_to_stay_in_float_does(compressed, onnx_files, tmp_path):
    """With pruning, ReLU, and heads, pyramid and first convolution in float."""
    operations = runtime_operations(onnx_files["int8"], tmp_path)
    network = compressed.pruned
    quantized = convolutions(
        network, outside=("class_heads", "box_heads", "landmark_heads", "backbone.stage1.0", "fpn")
    )
    assert quantized == convolutions(network) - 15
    assert operations["QLinearConv"] == quantized
    assert operations["Conv"] + operations["FusedConv"] == 15
    assert "BatchNormalization" not in operations
    assert "Relu" not in operations  # all are part of a convolution


@pytest.mark.parametrize("backend", ["openvino", "tensorrt"])
def test_an_activation_that_runs_within_the_convolution_is_not_rounded_twice(float_network, prepared, backend):
    other = prepare_for_training(float_network, QuantizationSettings(backend=backend))
    assert len(prepared.activations()) - len(other.activations()) == 38 + 9  # LeakyReLUs; outputs of heads
    for node in other.graph.graph.nodes:
        if node.target is torch.ops.aten.leaky_relu.default:
            assert node.args[0].target is torch.ops.aten.batch_norm.default


@pytest.mark.slow
def test_openvino_runs_every_convolution_of_its_files_in_int8(float_network, tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO, which is optional, is not installed")
    network = train(prepare_for_training(float_network, QuantizationSettings(backend="openvino")), 1)
    export_onnx(network, tmp_path / "int8.onnx")
    operations = Counter(node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node)
    assert operations["Conv"] == 56
    share = convolutions_in_int8(tmp_path / "int8.onnx", "openvino")
    assert (share.int8, share.total) == (56, 56)


@pytest.mark.slow
def test_tensorrt_has_no_zero_points(float_network, tmp_path):
    network = train(prepare_for_training(float_network, QuantizationSettings(backend="tensorrt")))
    assert not any(int(activation.zero_point) for activation in network.activations())
    assert min(float(activation.scale) for activation in network.activations()) > 0
    export_onnx(network, tmp_path / "int8.onnx")
    model = onnx.load(tmp_path / "int8.onnx")
    values = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    zero_points = [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zero_points
    assert all(value.dtype == "int8" and not value.any() for value in zero_points)


def test_seven_bits_for_weights_use_half_of_the_range(float_network):
    network = train(prepare_for_training(float_network, QuantizationSettings(weight_bits=7)), 1)
    graph = convert(network)
    weights = [value for value in graph.state_dict().values() if value.dtype == torch.int8]
    weights = weights or [buffer for buffer in graph.buffers() if buffer.dtype == torch.int8]
    assert len(weights) == 56
    assert max(int(weight.abs().max()) for weight in weights) == 63


@pytest.mark.parametrize("setting", [{"backend": "coreml"}, {"weight_bits": 4}], ids=str)
def test_unknown_settings_are_named(setting):
    (name,) = setting
    with pytest.raises(InputError, match=f"quantization: {name} is "):
        QuantizationSettings(**setting)


@pytest.mark.slow
def test_every_convolution_of_resnet50_runs_in_int8(build_network, tmp_path):
    network = build_network(backbone="resnet50", channels=32)
    export_onnx(train(prepare_for_training(network, ALL), 1), tmp_path / "int8.onnx")
    operations = runtime_operations(tmp_path / "int8.onnx", tmp_path)
    assert operations["QLinearConv"] == convolutions(network) == 82
    assert not {"Conv", "FusedConv", "BatchNormalization", "Relu"} & set(operations)


# Training


def test_ranges_and_statistics_move_in_training_only(fresh):
    statistics, ranges = batch_norm_buffers(fresh), activation_ranges(fresh)
    run(fresh.eval(), pictures(7) * 2)
    assert not moved(statistics, batch_norm_buffers(fresh))
    assert activation_ranges(fresh) == ranges
    run(fresh.train(), pictures(7) * 2)
    assert len(moved(statistics, batch_norm_buffers(fresh))) == len(statistics)
    assert activation_ranges(fresh) != ranges


def test_they_stand_still_once_frozen_and_can_go_on(fresh):
    fresh.statistics_frozen = fresh.ranges_frozen = True
    statistics, ranges = batch_norm_buffers(fresh), activation_ranges(fresh)
    run(fresh.train(), pictures(7) * 2)
    assert not moved(statistics, batch_norm_buffers(fresh))
    assert activation_ranges(fresh) == ranges
    assert all(torch.equal(a, b) for a, b in zip(run(fresh.train()), run(fresh.eval()), strict=True))
    fresh.statistics_frozen = fresh.ranges_frozen = False
    run(fresh.train(), pictures(7) * 2)
    assert moved(statistics, batch_norm_buffers(fresh))


def test_either_of_them_can_stand_still_alone(fresh):
    fresh.ranges_frozen = True
    statistics, ranges = batch_norm_buffers(fresh), activation_ranges(fresh)
    run(fresh.train(), pictures(7) * 2)
    assert moved(statistics, batch_norm_buffers(fresh))
    assert activation_ranges(fresh) == ranges
    fresh.ranges_frozen, fresh.statistics_frozen = False, True
    statistics = batch_norm_buffers(fresh)
    run(fresh.train(), pictures(7) * 2)
    assert not moved(statistics, batch_norm_buffers(fresh))
    assert activation_ranges(fresh) != ranges


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_mixed_precision_changes_nothing(float_network, backend):
    """bfloat16 would move what is rounded to 8 bits off its grid before a convolution sees it."""
    mixed = prepare_for_training(float_network, QuantizationSettings(backend=backend))
    precise = deepcopy(mixed)
    images = pictures(7).bfloat16()
    for training in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = mixed.train(training)(images)
        expected = precise.train(training)(images.float())
        for actual, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(actual, wanted)
            assert actual.dtype == torch.float32
        for each in (outputs, expected):
            sum(output.square().mean() for output in each).backward()
    for actual, wanted in zip(mixed.parameters(), precise.parameters(), strict=True):
        assert torch.equal(actual.grad, wanted.grad)
    assert not moved(precise.state_dict(), mixed.state_dict())


def test_without_rounding_it_is_the_float_network(fresh, float_network):
    train(network := prepare_for_training(float_network, ALL), 1)
    statistics = {name: value for name, value in float_network.state_dict().items() if "running" in name}
    network.graph.load_state_dict(statistics, strict=False)
    with network.without_rounding():
        for expected, actual in zip(run(float_network), run(network), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert any((a - b).abs().max() > 0.01 for a, b in zip(run(float_network), run(network), strict=True))


def test_modes_set_by_attribute_as_lightning_does(fresh):
    """After validation Lightning gives every module its old ``training`` flag back without calling ``train()``."""
    fresh.train()
    flags = {name: module.training for name, module in fresh.named_modules()}
    fresh.eval()
    run(fresh)
    statistics = batch_norm_buffers(fresh)
    for name, module in fresh.named_modules():
        module.training = flags[name]
    run(fresh)
    assert len(moved(statistics, batch_norm_buffers(fresh))) == len(statistics)


def test_eps_and_momentum_survive_switching(fresh, float_network):
    """Statistics move by a tenth towards the batch's, as in the float network's first batch norm."""
    key = "backbone.stage1.0.1.running_mean"
    with torch.no_grad():
        batch_mean = float_network.backbone.stage1[0][0](pictures(7)).mean((0, 2, 3))
    for _ in range(2):
        run(fresh.eval())
        before = fresh.graph.state_dict()[key].clone()
        run(fresh.train(), pictures(7))
        after = fresh.graph.state_dict()[key]
        expected = 0.9 * before + 0.1 * batch_mean
        assert ((after - expected).abs() < 0.05 * (after - before).abs().max()).all()


def test_gradients_reach_every_parameter(fresh, float_network):
    outputs = fresh.train()(pictures(1))
    sum(output.square().mean() for output in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in fresh.named_parameters()}
    assert len(gradients) == len(list(float_network.parameters()))
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    assert all(grad.any() for name, grad in gradients.items())


def test_a_batch_norm_weight_of_zero_does_not_end_in_nan(build_network):
    network = build_network(channels=16, strides=(32,), anchor_sizes=((16,),))
    network.backbone.stage1[1][1].weight.data[:3] = 0
    before = run(network)
    prepared = train(prepare_for_training(network, QuantizationSettings()))
    outputs = prepared.train()(pictures(1))
    sum(output.square().mean() for output in outputs).backward()
    assert all(p.grad.isfinite().all() for p in prepared.parameters())
    assert all(output.isfinite().all() for output in run(prepared.eval()))
    # The float network is left as it was.
    assert all(torch.equal(a, b) for a, b in zip(run(network), before, strict=True))
    assert not {id(p) for p in network.parameters()} & {id(p) for p in prepared.parameters()}
    assert any(module.inplace for module in network.modules() if isinstance(module, nn.LeakyReLU))


def test_weights_are_rounded_straight_through_and_by_their_own_range():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 1e-4, 1e-6, 0]).view(4, 1, 1, 1)
    weight.requires_grad_()
    rounding = PerChannelFakeQuantize(torch.int8, torch.per_channel_symmetric, -127, 127, 0, False)
    rounded = rounding(weight)
    scale, zero_point = rounding.calculate_qparams()
    torch.testing.assert_close(scale[:2], weight.detach()[:2].abs().amax((1, 2, 3)) / 127)
    assert not zero_point.any()
    assert ((rounded - weight).abs() <= 0.501 * scale.view(4, 1, 1, 1)).all()
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rounding(weight)
    # Within one operation, where NoWaiting does not see it: reading a number, for which a GPU is waited for.
    assert "aten::item" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ActivationFakeQuantize, {"quant_min": 0, "quant_max": 255}),
        (SymmetricActivationFakeQuantize, {"quant_min": -128, "quant_max": 127, "dtype": torch.int8}),
    ],
)
def test_maps_are_rounded_alike_in_every_layout(kind, settings):
    maps = torch.randn(2, 8, 8, 8)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        given = maps.clone(memory_format=layout).requires_grad_()
        rounding = kind(MovingAverageMinMaxObserver, **settings)
        rounded = rounding(given)
        assert rounded.is_contiguous(memory_format=layout)
        (rounded * maps).sum().backward()
        found.append((rounded, given.grad, *rounding.calculate_qparams()))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            rounding(given)
        copies = [event for event in profile.events() if event.name == "aten::copy_"]
        assert not any(maps.numel() in map(math.prod, event.input_shapes) for event in copies)
    assert all(torch.equal(*values) for values in zip(*found, strict=True))
    assert (found[0][0] != maps).any()


def test_a_gpu_is_left_alone_while_the_graph_is_made(float_network, monkeypatch):
    seen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "retinaface.compression.quantization.prepare_qat_pt2e",
        lambda graph, quantizer: seen.append(torch.cuda.is_available()) or graph,
    )
    prepare_for_training(float_network, ALL)
    assert seen == [False]
    assert torch.cuda.is_available()


# State


def test_weights_from_a_file_in_a_fresh_network_give_bit_equal_outputs(prepared, float_network, tmp_path):
    torch.save(prepared.state_dict(), tmp_path / "state.pt")
    other = prepare_for_training(deepcopy(float_network), ALL).eval()
    run(other)  # the graph has been in a mode of its own
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(run(other), run(prepared), strict=True))
    statistics = batch_norm_buffers(other)
    run(other.train())
    assert moved(statistics, batch_norm_buffers(other))


def test_unknown_names_in_keep_float(float_network):
    for unknown in ("head", "backbone.layer*"):
        with pytest.raises(InputError, match=f"keep_float names {re.escape(unknown)}, which the network does not have"):
            prepare_for_training(float_network, QuantizationSettings(keep_float=("fpn", unknown)))


def test_module_without_a_convolution_in_keep_float(float_network):
    with pytest.raises(InputError, match=r"keep_float names backbone\.stage1\.0\.1, which holds no convolution"):
        prepare_for_training(float_network, QuantizationSettings(keep_float=("backbone.stage1.0.1",)))


@pytest.mark.parametrize("averaging", [0, -0.1, 1.1])
def test_bad_averaging_is_named(averaging):
    with pytest.raises(InputError, match=f"averaging is {averaging}"):
        QuantizationSettings(averaging=averaging)


# Agreement


def recorded_convolutions(graph, images):
    """Weights and inputs of every convolution, by the module that it came from."""
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            if node.target is torch.ops.aten.conv2d.default:
                found[module_name(node)] = self.fetch_args_kwargs_from_env(node)[0][:2]
            return super().run_node(node)

    with torch.no_grad():
        Recorder(graph).run(images)
    return found


def test_converted_weights_are_those_trained_with(prepared, converted):
    """Also on the grid: a scale of its own would round every weight once more, by up to a whole step."""
    images = pictures(99)
    run(prepared, images)
    trained, written = recorded_convolutions(prepared.graph, images), recorded_convolutions(converted, images)
    assert trained.keys() == written.keys()
    assert len(trained) == 56
    for name, (_, weight) in trained.items():
        torch.testing.assert_close(written[name][1], weight, rtol=1e-5, atol=1e-9, msg=name)
    # Up to the second convolution nothing has had a chance to fall on the other side of a rounding step.
    for name in ("backbone.stage1.0.0", "backbone.stage1.1.0"):
        step = trained[name][0].unique().diff().min()
        assert ((written[name][0] - trained[name][0]).abs() > step / 2).float().mean() < 1e-3


def test_training_converted_and_runtime_agree(prepared, float_network, converted, onnx_file):
    """What is left is values on the edge of a rounding step, and all that follows from them.

    In units of what rounding costs at all: converted against trained less than .3, as biases are rounded too; ONNX
    Runtime against converted 0 to .3 on the public weights.
    """
    session = ort.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    images = pictures(99, 1, 3, 160, 192)
    trained, graph = run(prepared, images), run(converted, images)
    runtime = [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
    for exact, simulated, torch_int8, onnx_int8 in zip(
        run(float_network, images), trained, graph, runtime, strict=True
    ):
        cost = (exact - simulated).abs().mean()
        assert (simulated - torch_int8).abs().mean() < 0.3 * cost
        assert (torch_int8 - onnx_int8).abs().mean() < 0.3 * cost


def test_biases_are_whole_products_of_steps(converted):
    """As in the kernels of INT8, which add them in whole numbers."""
    checked = 0
    for node in converted.graph.nodes:
        if node.target is torch.ops.aten.conv2d.default:
            images, weight, bias = node.args[:3]
            step = images.args[1] * converted.get_buffer(str(weight.args[1].target))
            steps = converted.get_parameter(str(bias.target)).detach().double() / step.double()
            assert (steps - steps.round()).abs().max() < 1e-2
            assert steps.abs().max() > 2
            checked += 1
    assert checked == 56


def test_pruned_and_mixed_converted_agrees(compressed):
    network, prepared = compressed.pruned, compressed.int8
    images = pictures(99, 1, 3, 96, 128)
    for exact, simulated, written in zip(
        run(network, images), run(prepared, images), run(convert(prepared), images), strict=True
    ):
        assert (simulated - written).abs().mean() < 0.5 * (exact - simulated).abs().mean()


def test_converting_leaves_the_network_as_it_was(fresh):
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    fresh.train()
    convert(fresh)
    assert fresh.training
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items() if "observer" not in key)
    run(fresh)  # still in training mode
    assert moved(before, fresh.state_dict())
