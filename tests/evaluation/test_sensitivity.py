import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from retinaface.compression.channel_groups import find_groups
from retinaface.compression.pruning import PruningSettings, PruningTarget, make_plan
from retinaface.compression.structure import load_network
from retinaface.data.annotations import load_split
from retinaface.delivery.runtime import load_detector
from retinaface.errors import InputError
from retinaface.evaluation import sensitivity as under_test
from retinaface.evaluation.benchmark import Timing
from retinaface.evaluation.evaluate import average_precision, evaluate
from retinaface.evaluation.sensitivity import RATIOS, measure_sensitivity, sensitivity_table


@pytest.fixture
def networks(monkeypatch, onnx_files):
    """Nothing is exported or timed: the networks that would have been, and detection by the unpruned file."""
    exported = []

    def export(network, path):
        exported.append(network)
        path.write_bytes(onnx_files["float"].read_bytes())

    def benchmark(models, size, threads, warmup, rounds):
        fastest = [1.0, 1.1, 1.2, 1.3]
        return [
            Timing(str(m), size, 1, 1, rounds, 1, 1, 1, r, r, r, r, r, True)
            for m, r in zip(models, fastest, strict=True)
        ]

    def few_groups(network, importance):
        names = ("backbone.stage1.0.0", "backbone.stage3.1.3", "fpn.lateral.1.0", "ssh.0.conv3.0")
        return [group for group in find_groups(network, importance) if group.name in names]

    monkeypatch.setattr(under_test, "find_groups", few_groups)
    monkeypatch.setattr(under_test, "export_onnx", export)
    monkeypatch.setattr(under_test, "benchmark", benchmark)
    return exported


def test_every_group_is_pruned_by_itself(networks, tiny_checkpoint, tiny_root):
    measured = measure_sensitivity(tiny_checkpoint, tiny_root, limit=1, recalibrate=1)
    network, _ = load_network(tiny_checkpoint)
    groups = under_test.find_groups(network, "l1")
    assert [(group.name, group.channels) for group in measured.groups] == [(g.name, g.channels) for g in groups]
    assert len(networks) == 1 + len(RATIOS) * len(groups)
    assert measured.photos == 1
    for group, pruned in zip(groups, zip(*[iter(networks[1:])] * len(RATIOS), strict=True), strict=True):
        for ratio, each in zip(RATIOS, pruned, strict=True):
            changed = {
                name: (before.out_channels, each.get_submodule(name).out_channels)
                for name, before in network.named_modules()
                if hasattr(before, "out_channels") and before.out_channels != each.get_submodule(name).out_channels
            }
            assert set(changed) == {
                layer for layer in group.layers if hasattr(network.get_submodule(layer), "out_channels")
            }
            assert all(left == was - math.ceil(was * ratio) for was, left in changed.values())
    points = measured.groups[0].points
    assert [(point.ratio, point.speedup) for point in points] == [(0.25, 1.1), (0.5, 1.2), (0.75, 1.3)]
    assert all(point.ap_loss == measured.ap - point.ap for point in points)


def test_statistics_are_estimated_anew_on_training_photos(networks, monkeypatch, tiny_checkpoint, tiny_root):
    shown = []
    as_input = under_test.as_input
    monkeypatch.setattr(under_test, "as_input", lambda image: shown.append(image) or as_input(image))
    measure_sensitivity(tiny_checkpoint, tiny_root, limit=1, recalibrate=2)
    before, first = (network.backbone.stage3[1][4] for network in networks[:2])
    assert int(first.num_batches_tracked) == 2
    assert int(before.num_batches_tracked) == 2  # or the comparison would not be fair
    assert not networks[1].training
    samples = load_split(tiny_root, "train")
    for image, sample in zip(shown, (samples[0], samples[4]), strict=True):  # 2 of 8, from everywhere
        np.testing.assert_array_equal(image, sample.read())
    networks.clear()
    measure_sensitivity(tiny_checkpoint, tiny_root, limit=1, recalibrate=0)
    assert int(networks[1].backbone.stage3[1][4].num_batches_tracked) == 0


def test_loss_is_that_of_the_pruned_files(monkeypatch, tiny_checkpoint, tiny_root, networks):
    figures = iter([0.9, *[0.8, 0.7, 0.95] * 100])
    monkeypatch.setattr(under_test, "average_precision", lambda *arguments: next(figures))
    measured = measure_sensitivity(tiny_checkpoint, tiny_root, recalibrate=0)
    assert measured.ap == 0.9
    assert [point.ap_loss for point in measured.groups[2].points] == pytest.approx([0.1, 0.2, -0.05])
    console = Console(width=80)
    with console.capture() as capture:
        console.print(sensitivity_table(measured))
    assert "+0.100 1.10x" in capture.get()
    assert "-0.050 1.30x" in capture.get()


def test_a_plan_can_follow_the_file(monkeypatch, tiny_checkpoint, tiny_root, networks, tmp_path):
    figures = iter([0.9, *[0.85, 0.8, 0.6] * 100])
    monkeypatch.setattr(under_test, "average_precision", lambda *arguments: next(figures))
    monkeypatch.setattr(under_test, "find_groups", find_groups)
    monkeypatch.setattr(under_test, "_pruned", lambda network, *arguments: network)
    measured = measure_sensitivity(tiny_checkpoint, tiny_root, recalibrate=0)
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(asdict(measured)))
    network, _ = load_network(tiny_checkpoint)
    settings = PruningSettings(target=PruningTarget(macs=0.7), sensitivity=str(file), round_to=1)
    even = PruningSettings(target=PruningTarget(macs=0.7), round_to=1)
    assert make_plan(network, settings) == make_plan(network, even)  # all are alike in this file


def test_average_precision_is_that_of_an_evaluation(onnx_files, tiny_root):
    expected = evaluate(onnx_files["float"], tiny_root).accuracy.ap["all"]
    assert average_precision(load_detector(onnx_files["float"]), load_split(tiny_root, "val"), "") == expected


def test_taylor_and_int8_are_refused(tiny_root, tiny_checkpoint, checkpoint_files):
    with pytest.raises(InputError, match="importance taylor needs"):
        measure_sensitivity(tiny_checkpoint, tiny_root, importance="taylor")
    with pytest.raises(InputError, match="quantized already"):
        measure_sensitivity(checkpoint_files["int8"], tiny_root)
