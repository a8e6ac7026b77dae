from collections import Counter

import pytest
import torch
from rich.console import Console
from torch import nn

from retinaface.compression.quantization import FakeQuantizedRetinaFace, QuantizationSettings
from retinaface.compression.structure import load_network
from retinaface.data.annotations import load_split
from retinaface.errors import InputError
from retinaface.evaluation import mixed_precision as under_test
from retinaface.evaluation.benchmark import Timing
from retinaface.evaluation.mixed_precision import (
    blocks,
    choose_keep_float,
    measure_mixed_precision,
    mixed_precision_table,
    units,
)
from retinaface.model.network import NetworkConfig, RetinaFace

HEADS = ("class_heads", "box_heads", "landmark_heads")


@pytest.mark.parametrize("backbone", ["mobilenet0.25", "resnet50"])
def test_blocks_hold_every_convolution_once(backbone):
    network = RetinaFace(NetworkConfig(backbone))
    held = Counter(
        f"{block}.{name}" if name else block
        for block in blocks(network)
        for name, module in network.get_submodule(block).named_modules()
        if isinstance(module, nn.Conv2d)
    )
    assert held == Counter(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def test_blocks_of_both_backbones():
    common = ["fpn", "ssh.0", "ssh.1", "ssh.2", *HEADS]
    stages = {"stage1": 6, "stage2": 6, "stage3": 2}
    separable = [f"backbone.{stage}.{index}" for stage, count in stages.items() for index in range(count)]
    assert blocks(RetinaFace()) == [*separable, *common]
    layers = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
    bottlenecks = [f"backbone.{layer}.{index}" for layer, count in layers.items() for index in range(count)]
    assert blocks(RetinaFace(NetworkConfig("resnet50"))) == ["backbone.conv1", *bottlenecks, *common]


def test_units_are_blocks_stages_and_all_heads():
    network = RetinaFace()
    found = units(network)
    stages = {"backbone", "backbone.stage1", "backbone.stage2", "backbone.stage3", "ssh"}
    assert set(found) == {*blocks(network), *stages, "*_heads"}
    assert found.pop("*_heads") == HEADS
    assert all(names == (name,) for name, names in found.items())


@pytest.mark.parametrize(
    ("kept", "added", "joined"),
    [
        ((), ("ssh.1",), ("ssh.1",)),
        (("ssh.1",), ("fpn",), ("ssh.1", "fpn")),
        (("ssh.1", "fpn", "ssh.2"), ("ssh",), ("fpn", "ssh")),
        (("ssh",), ("ssh.1",), ("ssh",)),
        (("a.stage1",), ("a.stage10",), ("a.stage1", "a.stage10")),
        (("box_heads",), HEADS, ("box_heads", "class_heads", "landmark_heads")),
    ],
)
def test_what_lies_in_another_is_named_once(kept, added, joined):
    assert under_test._joined(kept, added) == joined


class Pretended:
    """Stands in for exports, evaluations and timings: figures follow from the names of what stays in float.

    Attributes:
        gains: Block, or stage, to the AP that it wins back in float.
        savings: To the share of the time that is saved by it in float; all-INT8 takes 1.
        whole: AP and time of the network in float.
        timed: What each benchmark compared.
    """

    def __init__(self):
        self.gains, self.savings = {}, {}
        self.whole = (0.8, 2.0)
        self.int8_ap = 0.7
        self.exported, self.timed = [], []
        self.kept = {}

    def prepare(self, network, settings):
        assert settings.averaging == 0.5
        return settings.keep_float

    def export(self, network, path):
        self.kept[path] = None if isinstance(network, RetinaFace) else network
        self.exported.append(self.kept[path])
        path.touch()

    def time(self, kept):
        return self.whole[1] if kept is None else 1 - sum(self.savings.get(name, 0) for name in kept)

    def average_precision(self, path, samples, title):
        kept = self.kept[path]
        return self.whole[0] if kept is None else self.int8_ap + sum(self.gains.get(name, 0) for name in kept)

    def benchmark(self, files, size, threads, warmup, rounds):
        assert all(file.is_file() for file in files)
        self.timed.append([self.kept[file] for file in files])
        times = [self.time(self.kept[file]) for file in files]
        ratios = [times[0] / time for time in times]
        return [
            Timing(str(file), 1, 1, 1, 1, 1, 1, 1, r, r, r, r, r, r != 1) for file, r in zip(files, ratios, strict=True)
        ]


@pytest.fixture
def pretended(monkeypatch):
    pretended = Pretended()
    monkeypatch.setattr(under_test, "prepare_for_training", pretended.prepare)
    monkeypatch.setattr(under_test, "calibrate", lambda *arguments: None)
    monkeypatch.setattr(under_test, "export_onnx", pretended.export)
    monkeypatch.setattr(under_test, "average_precision", pretended.average_precision)
    monkeypatch.setattr(under_test, "load_detector", lambda path, **_: path)
    monkeypatch.setattr(under_test, "benchmark", pretended.benchmark)
    return pretended


@pytest.fixture
def choose(pretended, tiny_network, tiny_root):
    """Chooses for a budget among pretended figures."""
    samples = load_split(tiny_root, "train")

    def choose(budget=0.01, samples=samples, **options):
        settings = QuantizationSettings(averaging=0.5)
        return choose_keep_float(tiny_network, samples, [], budget, settings, **options)

    return choose


def test_int8_everywhere_stays_where_it_is_best(choose, pretended):
    pretended.int8_ap = 0.795
    choice = choose()
    assert choice.keep_float == ()
    assert choice.tried == []
    assert choice.whole.speedup == 0.5
    assert len(pretended.exported) == 2 + len(choice.measured.units)


def test_what_is_faster_in_float_is_added_best_first(choose, pretended):
    pretended.int8_ap = 0.795
    pretended.savings = {"backbone.stage1": 0.2, "backbone.stage1.1": 0.1, "class_heads": 0.05, "fpn": -0.3}
    told = []
    choice = choose(report=told.append)
    assert choice.keep_float == ("backbone.stage1", "class_heads")
    assert choice.chosen.speedup == pytest.approx(1 / 0.75)
    assert [trial.keep_float for trial in choice.tried] == [
        ("backbone.stage1",),  # the block within it is not tried
        ("backbone.stage1", "class_heads"),
        ("backbone.stage1", "class_heads", "box_heads", "landmark_heads"),  # no faster
    ]
    assert told == choice.tried


def test_what_is_faster_alone_only_is_left_out(choose, pretended, monkeypatch):
    pretended.int8_ap = 0.795
    pretended.savings = {"backbone.stage1": 0.2, "fpn": 0.1}
    alone = pretended.time
    monkeypatch.setattr(pretended, "time", lambda kept: 0.9 if kept == ("backbone.stage1", "fpn") else alone(kept))
    choice = choose()
    assert choice.keep_float == ("backbone.stage1",)
    assert choice.tried[-1].keep_float == ("backbone.stage1", "fpn")


def test_accuracy_is_won_back_where_it_costs_least(choose, pretended):
    pretended.gains = {"fpn": 0.06, "ssh.0": 0.05, "ssh.1": 0.04, "ssh.2": -0.1}
    pretended.savings = {"fpn": -0.3, "ssh.0": -0.1, "ssh.1": -0.01}
    choice = choose(budget=0.015)
    assert choice.keep_float == ("ssh.1", "ssh.0")
    assert choice.chosen.ap == pytest.approx(0.79)
    assert choose(budget=0.07).keep_float == ("ssh.1",)
    assert choose(budget=0.005).keep_float == ("ssh.1", "ssh.0", "fpn")


def test_every_combination_is_timed_with_the_one_before_int8_and_float(choose, pretended):
    pretended.gains = {"ssh.0": 0.05, "ssh.1": 0.04}
    pretended.savings = {"ssh.0": -0.1, "ssh.1": -0.01}
    choice = choose(budget=0.015)
    assert pretended.timed[-2:] == [
        [(), None, (), ("ssh.1",)],
        [(), None, ("ssh.1",), ("ssh.1", "ssh.0")],
    ]
    assert choice.chosen == choice.tried[-1]


def test_number_of_combinations_is_bounded(choose, pretended, tiny_network):
    names = blocks(tiny_network)
    pretended.gains = dict.fromkeys(names, 0.001)
    pretended.savings = dict.fromkeys(names, 0.001)
    with pytest.raises(InputError, match=r"the budget is 0\.01"):
        choose()
    assert len(pretended.exported) <= 2 + len(units(tiny_network)) + 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"int8_ap": 0.5}, r"loses 0\.300 .* even with nothing in float, and the budget is 0\.01"),
        ({"whole": (0.8, 0.9), "int8_ap": 0.8}, r"with nothing in float .* 0\.90x as fast as in float"),
        # Float enough to be accurate, and no faster than float.
        ({"gains": {"ssh": 0.1}, "savings": {"ssh": -1.5}}, r"with ssh in float .* 0\.80x as fast"),
    ],
    ids=["no accuracy", "no speed", "no both"],
)
def test_a_hopeless_choice_is_explained(choose, pretended, settings, message):
    vars(pretended).update(settings)
    with pytest.raises(InputError, match=message):
        choose()


def test_photos_without_faces_and_other_runtimes_are_refused(choose, tiny_network, tiny_root):
    with pytest.raises(InputError, match="none of the 0 photos"):
        choose(samples=[])
    with pytest.raises(InputError, match="say nothing about openvino"):
        choose_keep_float(tiny_network, [], [], settings=QuantizationSettings(backend="openvino"))


def test_every_unit_is_measured_alone(monkeypatch, pretended, tiny_checkpoint, tiny_root):
    monkeypatch.setattr(pretended, "prepare", lambda network, settings: settings.keep_float)
    monkeypatch.setattr(under_test, "prepare_for_training", pretended.prepare)
    pretended.gains, pretended.savings = {"ssh.1": 0.05}, {"backbone.stage1": 0.5, "ssh.1": -1.0}
    measured = measure_mixed_precision(tiny_checkpoint, tiny_root, limit=3, photos=2)
    network, _ = load_network(tiny_checkpoint)
    assert list(measured.units) == list(units(network))
    assert pretended.exported == [(), None, *units(network).values()]
    assert measured.photos == 3
    assert (measured.whole.speedup, measured.int8.speedup) == (0.5, 1.0)
    assert (measured.units["backbone.stage1"].speedup, measured.units["ssh.1"].speedup) == (2.0, 0.5)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(mixed_precision_table(measured))
    rows = {line.split("│")[1].strip(): line for line in capture.get().splitlines() if line.startswith("│")}
    assert set(rows) == {"nothing", "everything", *units(network)}
    for text in ("0.7500", "+0.0500", "0.50x", "slower"):
        assert text in rows["ssh.1"]
    assert "faster" in rows["backbone.stage1"]
    assert "within noise" in rows["fpn"]


def test_a_real_file_holds_the_block_in_float(tiny_network, tiny_root, tmp_path, monkeypatch):
    samples = load_split(tiny_root, "val")[:2]
    prepared = []
    monkeypatch.setattr(under_test, "export_onnx", lambda network, path: prepared.append(network) or path.touch())
    monkeypatch.setattr(under_test, "average_precision", lambda *arguments: 0.5)
    monkeypatch.setattr(under_test, "load_detector", lambda path, **_: path)
    monkeypatch.setattr(under_test, "benchmark", Pretended().benchmark)
    pictures = [torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 255 - 110]
    meter = under_test._Meter(tiny_network, samples, pictures, QuantizationSettings(), tmp_path, 64, 1)
    meter._file(("ssh", "fpn"))
    (network,) = prepared
    assert isinstance(network, FakeQuantizedRetinaFace)
    assert network.settings.keep_float == ("ssh", "fpn")
    assert all(float(each.scale) != 1 for each in network.activations())  # ranges were found
