import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from retinaface.cpus import physical_cores
from retinaface.errors import InputError
from retinaface.evaluation import benchmark as module
from retinaface.evaluation.benchmark import Failure, Rounds, benchmark, machine_facts, pair_up, time_in_turns
from retinaface.evaluation.raw_call import RawCall


def save_model(path, convolutions=1, shape=("batch", 3, "height", "width"), kind=TensorProto.FLOAT):
    """Write a chain of convolutions 3 → 3 channels as an ONNX file."""
    nodes = [helper.make_node("Cast", ["photo"], ["x0"], to=TensorProto.FLOAT)]
    nodes += [
        helper.make_node("Conv", [f"x{i}", "weight"], [f"x{i + 1}"], pads=[1] * 4, strides=[1, 1])
        for i in range(convolutions)
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("photo", kind, shape)],
        [helper.make_tensor_value_info(f"x{convolutions}", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.full((3, 3, 3, 3), 0.03, np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, path)
    return path


def test_the_smaller_model_is_faster(tmp_path):
    large = save_model(tmp_path / "large.onnx", convolutions=20)
    small = save_model(tmp_path / "small.onnx", convolutions=1)
    baseline, candidate = benchmark([large, small], size=96, threads=1, warmup=1, rounds=15)
    assert baseline.model == str(large)
    assert (baseline.ratio, baseline.ratio_low, baseline.ratio_high, baseline.differs) == (1, 1, 1, False)
    assert candidate.median_ms < baseline.median_ms
    assert candidate.p10_ms <= candidate.median_ms <= candidate.p90_ms
    assert candidate.ratio > 3
    assert candidate.differs
    assert (candidate.size, candidate.batch, candidate.threads, candidate.rounds) == (96, 1, 1, 15)
    json.dumps([dataclasses.asdict(timing) for timing in (baseline, candidate)])


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8])
def test_inputs_of_every_type_fixed_or_dynamic(tmp_path, kind):
    dynamic = save_model(tmp_path / "dynamic.onnx", kind=kind)
    fixed = save_model(tmp_path / "fixed.onnx", shape=(2, 3, 32, 48), kind=kind)
    timings = benchmark([dynamic, fixed], size=(32, 48), warmup=0, rounds=2, batch=2)
    assert [timing.batch for timing in timings] == [2, 2]
    assert timings[1].ratio_low is None  # two rounds are too few to tell
    assert not timings[1].differs
    assert timings[0].threads == physical_cores()


class FakeCall:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def milliseconds(self):
        self.log.append(self.name)
        return float(len(self.log))


def test_models_take_turns_in_changing_order():
    log = []
    times = module.interleaved_times([FakeCall(name, log) for name in "ABC"], warmup=1, rounds=99, title="")
    turns = ["".join(log[start : start + 3]) for start in range(0, 300, 3)]
    assert {*turns} == {"ABC", "ACB", "BAC", "BCA", "CAB", "CBA"}
    # Each time lands in the column of its model, the warm-up is left out.
    expected = [[4 + 3 * number + turn.index(name) for name in "ABC"] for number, turn in enumerate(turns[1:])]
    assert times.tolist() == expected


def summary(baseline, times):
    entries = ((0, "onnxruntime"), (1, "onnxruntime"))
    return Rounds((Path("a.onnx"), Path("m.onnx")), entries, np.stack([baseline, times], 1), 640, 1, 2)._summarise(1, 0)


def test_disturbances_of_whole_rounds_cancel():
    random = np.random.default_rng(0)
    disturbance = random.choice([1.0, 1.5, 3.0], 100)
    baseline = 10 * disturbance * random.normal(1, 0.02, 100)
    candidate = 9.5 * disturbance * random.normal(1, 0.02, 100)
    timing = summary(baseline, candidate)
    assert timing.ratio == pytest.approx(10 / 9.5, abs=0.01)
    assert timing.ratio_low > 1
    assert timing.ratio_p10 <= timing.ratio_low <= timing.ratio <= timing.ratio_high <= timing.ratio_p90
    assert timing.differs
    assert summary(candidate, baseline).differs
    assert summary(candidate, baseline).ratio < 1


def test_noise_is_rarely_called_a_difference():
    random = np.random.default_rng(0)
    verdicts = [summary(*(10 * random.lognormal(0, 0.2, (2, 50)))).differs for _ in range(200)]
    assert sum(verdicts) <= 20  # 5 % expected


def test_what_two_sessions_of_one_file_differ_by_is_no_difference():
    baseline = np.full(100, 10.0)
    differ = [summary(baseline, baseline * factor).differs for factor in (0.96, 0.98, 1.02, 1.04)]
    assert differ == [True, False, False, True]


def test_everyone_against_the_first_within_a_runtime_and_at_best():
    entries = ((0, "onnxruntime"), (0, "openvino"), (1, "onnxruntime"), (1, "openvino"))
    times = np.tile([13.0, 8.0, 7.0, 10.0], (20, 1)) * np.linspace(1, 3, 20)[:, None]
    rounds = Rounds((Path("teacher.onnx"), Path("int8.onnx")), entries, times, 640, 1, 2)

    def seen(timings):
        return [(Path(each.model).stem, each.runtime, each.ratio) for each in timings]

    teacher, int8 = ("teacher", "onnxruntime", 1.0), ("int8", "onnxruntime", pytest.approx(13 / 7))
    assert seen(rounds.timings())[0] == teacher
    assert seen(rounds.timings())[2] == int8
    assert seen(rounds.within("onnxruntime")) == [teacher, int8]
    assert seen(rounds.within("openvino")) == [("teacher", "openvino", 1.0), ("int8", "openvino", pytest.approx(0.8))]
    assert seen(rounds.fastest()) == [("teacher", "openvino", 1.0), ("int8", "onnxruntime", pytest.approx(8 / 7))]


def test_models_are_paired_with_the_runtimes_of_their_kind():
    models = [Path("a.ckpt"), Path("b.onnx")]
    assert pair_up(models, ["onnxruntime", "torch", "openvino", "torch"]) == [
        (0, "torch"),
        (1, "onnxruntime"),
        (1, "openvino"),
    ]
    with pytest.raises(InputError, match=r"a\.ckpt: onnxruntime and openvino cannot run it"):
        pair_up(models, ["onnxruntime", "openvino"])
    with pytest.raises(InputError, match=r"runtime torch: none of the models is for it; name a \.ckpt or \.pth"):
        pair_up(models[1:], ["onnxruntime", "torch"])


def test_all_models_and_runtimes_take_turns_in_the_same_rounds(monkeypatch):
    log = []

    def pretend(model, runtime, size, batch, threads):
        log.append((model.name, runtime, size, batch, threads))
        return RawCall(lambda: None)

    monkeypatch.setattr(module, "prepare", pretend)
    rounds = time_in_turns([Path("a.onnx"), Path("b.onnx")], ["openvino", "onnxruntime"], 96, 3, 1, 5, 2)
    assert log == [
        (name, runtime, 96, 2, 3) for name in ("a.onnx", "b.onnx") for runtime in ("openvino", "onnxruntime")
    ]
    assert rounds.milliseconds.shape == (5, 4)
    assert [timing.runtime for timing in rounds.timings()] == ["openvino", "onnxruntime"] * 2
    assert (rounds.size, rounds.batch, rounds.threads) == (96, 2, 3)


def test_what_a_runtime_that_nobody_asked_for_does_not_run_is_noted(monkeypatch):
    def pretend(model, runtime, *_):
        if (model.name, runtime) == ("b.onnx", "openvino"):
            raise InputError(f"{model}: OpenVINO cannot load it (too odd)")
        return RawCall(lambda: None)

    monkeypatch.setattr(module, "prepare", pretend)
    models, runtimes = [Path("x/a.onnx"), Path("x/b.onnx")], ["onnxruntime", "openvino"]
    rounds = time_in_turns(models, runtimes, 64, 1, 0, 3, optional=["openvino"])
    assert rounds.entries == ((0, "onnxruntime"), (0, "openvino"), (1, "onnxruntime"))
    assert rounds.failures == (Failure("x/b.onnx", "openvino", "OpenVINO cannot load it (too odd)"),)
    assert rounds.milliseconds.shape == (3, 3)
    assert len(rounds.within("openvino")) == 1
    with pytest.raises(InputError, match=r"b\.onnx: OpenVINO cannot load it"):
        time_in_turns(models, runtimes, 64, 1, 0, 3)


def test_bad_models_are_refused(tmp_path):
    good = save_model(tmp_path / "good.onnx")
    with pytest.raises(InputError, match="no model given"):
        benchmark([])
    with pytest.raises(InputError, match=r"missing\.onnx: no such file"):
        benchmark([good, tmp_path / "missing.onnx"])
    text = tmp_path / "text.onnx"
    text.write_text("this is\nno model")
    with pytest.raises(InputError, match=r"text\.onnx: ONNX Runtime cannot load it") as error:
        benchmark([text])
    assert "\n" not in str(error.value)
    fixed = save_model(tmp_path / "fixed.onnx", shape=(1, 3, 64, 64))
    with pytest.raises(InputError, match=r"fixed\.onnx: takes inputs of \[1, 3, 64, 64\] only"):
        benchmark([fixed], size=32)
    flat = save_model(tmp_path / "flat.onnx", convolutions=0, shape=("batch", 3))
    with pytest.raises(InputError, match=r"flat\.onnx: .*expected one image input"):
        benchmark([flat], size=32)
    grey = save_model(tmp_path / "grey.onnx", shape=("batch", 1, "height", "width"))
    with pytest.raises(InputError, match=r"grey\.onnx: takes inputs of"):
        benchmark([grey], size=32)
    undeclared = save_model(tmp_path / "undeclared.onnx", shape=("batch", "channels", "height", "width"))
    model = onnx.load(undeclared)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 4, 3, 3), np.float32), "weight"))
    onnx.save(model, undeclared)
    with pytest.raises(InputError, match=r"undeclared\.onnx: fails on an input of \[1, 3, 32, 32\]"):
        benchmark([undeclared], size=32)


@pytest.mark.parametrize(("option", "least"), [("size", 1), ("threads", 1), ("rounds", 1), ("batch", 1), ("warmup", 0)])
def test_numbers_must_make_sense(tmp_path, option, least):
    with pytest.raises(InputError, match=f"{option} must be at least {least}, got {least - 1}"):
        benchmark([save_model(tmp_path / "good.onnx")], **{option: least - 1})


def test_machine_facts(monkeypatch):
    monkeypatch.setattr(module, "cpu_flags", lambda: {"sse2", "avx512_vnni", "avx2"})
    monkeypatch.setattr(module, "cpu_name", lambda: "Some CPU @ 3 GHz")
    facts = machine_facts()
    assert facts["flags"] == ["avx2", "avx512_vnni"]
    assert facts["cpu"] == "Some CPU @ 3 GHz"
    assert facts["threads"] >= facts["cores"] >= 1
    assert facts["onnxruntime"]
    assert "openvino" in facts
    json.dumps(facts)


def test_an_absent_package_has_no_version():
    assert module._version("no-such-package-anywhere") is None
