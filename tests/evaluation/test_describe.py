import pytest
from rich.console import Console

from retinaface.compression.pruning import count_complexity
from retinaface.compression.structure import load_network, load_structure
from retinaface.evaluation.describe import describe, description_table, kept_channels


@pytest.mark.parametrize("name", ["public", "float", "pruned", "int8"])
def test_layers_add_up_to_the_network(checkpoint_files, name):
    description = describe(load_structure(checkpoint_files[name]), 128)
    network = load_structure(checkpoint_files[name]).build_float()
    assert (description.params, description.macs) == count_complexity(network, 128)
    assert sum(layer.macs for layer in description.layers) == description.macs
    convolutions = {n: p for n, p in network.named_parameters() if "heads" in n or p.ndim == 4}
    assert sum(layer.params for layer in description.layers) == sum(p.numel() for p in convolutions.values())


def test_what_pruning_left(checkpoint_files, compressed):
    float_network, _ = load_network(checkpoint_files["pruned"])
    for name in ("pruned", "int8"):
        description = describe(load_structure(checkpoint_files[name]), 64)
        assert (description.params_before, description.macs_before) == count_complexity(compressed.original, 64)
        kept = kept_channels(description.layers)
        assert kept["fpn.lateral.0.0"] == (32, 16)
        assert kept["backbone.stage3.1.3"] == (256, float_network.backbone.stage3[1][3].out_channels)
        assert kept["class_heads.1"] == (4, 4)
        assert "backbone.stage3.1.0" not in kept  # depthwise


def test_layers_are_described(checkpoint_files):
    layers = {layer.name: layer for layer in describe(load_structure(checkpoint_files["float"]), 64).layers}
    first, depthwise, head = (layers[name] for name in ("backbone.stage1.0.0", "backbone.stage1.2.0", "box_heads.0"))
    assert (first.kernel, first.stride, first.depthwise, first.channels) == ((3, 3), 2, False, 8)
    assert (first.params, first.macs) == (3 * 8 * 9, 3 * 8 * 9 * 32 * 32)
    assert (depthwise.depthwise, depthwise.stride, depthwise.macs) == (True, 2, 16 * 9 * 16 * 16)
    assert (head.params, head.macs) == (16 * 8 + 8, 16 * 8 * 8 * 8)


def test_table(checkpoint_files):
    console = Console(markup=False, width=80)
    with console.capture() as capture:
        console.print(description_table(describe(load_structure(checkpoint_files["pruned"]), 64), "a [model]"))
    text = capture.get()
    assert "a [model] (MACs at 64x64)" in text
    assert "32 → 16" in text
    assert "before pruning" in text
    assert "landmark_heads.2" in text  # not cut off
