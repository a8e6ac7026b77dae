from copy import deepcopy

import pytest
import torch
from torch import nn

from retinaface.compression.features import FeatureTap, feature_widths, make_adapters
from retinaface.compression.quantization import QuantizationSettings, convert, prepare_for_training

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3)) * 255 - 110


def run(network, images=IMAGES):
    with torch.no_grad():
        return network(images)


def tapped(network, levels):
    with FeatureTap(network, levels) as tap:
        outputs = run(network)
    return outputs, tap.features


@pytest.fixture(scope="module")
def all_int8(build_network):
    """A float network, and the same prepared for INT8 everywhere."""
    network = build_network(channels=16, activation="relu")
    quantized = prepare_for_training(network, QuantizationSettings(keep_float=(), averaging=0.5)).train()
    run(quantized)
    return network, with_statistics(quantized, network)


@pytest.fixture(scope="module")
def kept_float(compressed):
    """A pruned network, and the same prepared for INT8 with pyramid and heads in float."""
    return compressed.pruned, with_statistics(deepcopy(compressed.int8), compressed.pruned)


def with_statistics(quantized, network):
    """Gives a quantized network back the float one's batch statistics, which training has moved."""
    state = quantized.state_dict()
    state |= {f"graph.{name}": value for name, value in network.named_buffers()}
    quantized.load_state_dict(state)
    return quantized.eval()


@pytest.fixture(params=["all_int8", "kept_float"])
def pair(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("levels", ["fpn", "ssh"])
def test_features_of_a_float_network_are_those_of_its_modules(tiny_network, levels):
    outputs, features = tapped(tiny_network, levels)
    assert all(torch.equal(a, b) for a, b in zip(outputs, run(tiny_network), strict=True))
    with torch.no_grad():
        expected = tiny_network.fpn(tiny_network.backbone(IMAGES)[tiny_network.levels])
        if levels == "ssh":
            expected = [context(level) for context, level in zip(tiny_network.ssh, expected, strict=True)]
    assert [tuple(maps.shape) for maps in features] == [(2, 16, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_all_features_are_the_backbones_the_pyramids_and_the_context_modules(tiny_network, build_network):
    features = tapped(tiny_network, "all")[1]
    with torch.no_grad():
        expected = tiny_network.backbone(IMAGES)[tiny_network.levels]
    expected += tapped(tiny_network, "fpn")[1] + tapped(tiny_network, "ssh")[1]
    assert len(features) == 9
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    fine = build_network(channels=16, anchor_sizes=[[8]] * 4, strides=[4, 8, 16, 32])
    assert feature_widths(fine, "all") == [32, 64, 128, 256, *[16] * 8]
    deep = build_network(backbone="resnet50", channels=16)
    assert feature_widths(deep, "all") == [512, 1024, 2048, *[16] * 6]


@pytest.mark.parametrize("levels", ["fpn", "ssh", "all"])
def test_features_of_a_quantized_network_are_the_float_ones_without_rounding(pair, levels):
    network, quantized = pair
    expected = tapped(network, levels)[1]
    with quantized.without_rounding():
        exact = tapped(quantized, levels)[1]
    for actual, wanted in zip(exact, expected, strict=True):
        # Weights are multiplied with the batch norm's scale first, in float32.
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    rounded = tapped(quantized, levels)[1]
    assert not any(torch.equal(a, b) for a, b in zip(rounded, exact, strict=True))


def test_quantized_features_are_rounded_where_what_follows_reads_them_rounded(all_int8, kept_float):
    def rounded(quantized, levels):
        """Whether the values lie apart by at least an 8-bit step of their range; 1e-3 is for sums in float32."""
        values = [maps.unique() for maps in tapped(quantized, levels)[1]]
        return [bool(each.diff().min() > (each[-1] - each[0]) / 255 * (1 - 1e-3)) for each in values]

    for levels in ("fpn", "ssh"):
        assert rounded(all_int8[1], levels) == [True, True, True]
    assert rounded(kept_float[1], "fpn") == [True, False, False]  # the pyramid reads its coarser levels in float


def test_a_tap_changes_nothing_that_is_trained_or_converted(kept_float):
    quantized = kept_float[1]
    untouched, touched = deepcopy(quantized), deepcopy(quantized)
    for levels in ("fpn", "ssh"):
        tapped(touched, levels)
    assert touched.state_dict().keys() == untouched.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(run(touched), run(untouched), strict=True))
    converted, expected = convert(touched), convert(untouched)
    assert [(n.op, str(n.target)) for n in converted.graph.nodes] == [
        (n.op, str(n.target)) for n in expected.graph.nodes
    ]
    assert all(torch.equal(a, b) for a, b in zip(run(converted), run(expected), strict=True))


def test_a_closed_tap_is_gone(pair):
    for network in pair:
        _, features = tapped(network, "fpn")
        assert not any(module._forward_hooks for module in network.modules())
        with FeatureTap(network, "fpn") as tap:
            assert tap.features == []
            run(network, IMAGES[:1])
        assert len(tap.features[0]) == 1
        assert len(features[0]) == 2


def test_gradients_of_quantized_features_reach_the_weights(pair):
    quantized = deepcopy(pair[1]).train()
    with FeatureTap(quantized, "fpn") as tap:
        quantized(IMAGES)
    sum(maps.square().mean() for maps in tap.features).backward()
    graph = quantized.graph
    assert graph.get_parameter("backbone.stage1.0.0.weight").grad.abs().sum() > 0
    assert graph.get_parameter("fpn.lateral.2.0.weight").grad.abs().sum() > 0
    assert graph.get_parameter("ssh.0.conv3.0.weight").grad is None


def test_widths_are_found_without_a_trace(compressed):
    assert feature_widths(compressed.original, "fpn") == feature_widths(compressed.original, "ssh") == [32, 32, 32]
    for network in (compressed.pruned, deepcopy(compressed.int8)):
        network.train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        for levels in ("fpn", "ssh", "all"):
            widths = feature_widths(network, levels)
            assert widths == [maps.shape[1] for maps in tapped(deepcopy(network), levels)[1]]
            assert all(width < 32 for width in widths[-3:])
        assert network.training
        moved = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
        assert all(name.endswith("observer_enabled") for name in moved)  # set again by the next forward pass
        network.eval()


def test_adapters_where_widths_differ():
    adapters = make_adapters([8, 16, 4], [16, 16, 16])
    assert [type(each) for each in adapters] == [nn.Conv2d, nn.Identity, nn.Conv2d]
    assert list(adapters.state_dict()) == ["0.weight", "2.weight"]
    assert adapters[2](torch.rand(1, 4, 5, 6)).shape == (1, 16, 5, 6)
