import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from retinaface.evaluation.benchmark import Failure, Rounds
from retinaface.evaluation.benchmark_text import (
    benchmark_markdown,
    benchmark_table,
    describe_failures,
    describe_fastest,
    describe_rounds,
    footprint_table,
)
from retinaface.evaluation.footprint import Footprint

MODELS = tuple(Path("run") / name for name in ("base.onnx", "int8.onnx", "slow.onnx", "same.onnx"))
FOOTPRINTS = [Footprint("run/int8.onnx", "openvino", 432_100, 98_760_000)]


def make_rounds(runtimes=("onnxruntime",), medians=(12.34, 6.17, 24.68, 12.34)):
    noise = np.random.default_rng(0).normal(1, 0.02, (40, len(medians)))
    entries = tuple((index, runtime) for index in range(len(medians) // len(runtimes)) for runtime in runtimes)
    return Rounds(MODELS, entries, np.array(medians) * noise, 640, 1, 2)


def printed(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()


def test_few_rounds_tell_nothing():
    rounds = replace(make_rounds(), milliseconds=make_rounds().milliseconds[:5])
    assert printed(benchmark_table(rounds)).count("too few rounds") == 3


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_baseline_faster_slower_and_noise_are_told(form):
    rounds = make_rounds()
    text = printed(benchmark_table(rounds)) if form == "table" else benchmark_markdown([rounds], [], "anyhow", {})
    assert "1x3x640x640, 2 threads, 40 rounds" in text
    for model, figure, verdict in (
        ("base.onnx", "12.", "baseline"),
        ("int8.onnx", "2.0", "faster"),
        ("slow.onnx", "0.50x", "slower"),
        ("same.onnx", "1.0", "within noise"),
    ):
        (line,) = (line for line in text.splitlines() if model in line)
        assert figure in line
        assert verdict in line
        assert "run/" not in line  # the folder says nothing here


def test_models_of_one_name_are_told_apart_by_their_folders():
    models = (Path("far/away/one/int8.onnx"), Path("far/away/two/int8.onnx"))
    rounds = Rounds(models, ((0, "onnxruntime"), (1, "onnxruntime")), np.ones((20, 2)), 640, 1, 1)
    text = benchmark_markdown([rounds], [], "anyhow", {})
    assert "one/int8.onnx" in text
    assert "two/int8.onnx" in text
    assert "away" not in text
    assert "1 thread," in describe_rounds(rounds)


def test_the_choice_of_a_user_needs_several_runtimes():
    assert describe_fastest(make_rounds()) == []
    (sentence,) = describe_fastest(make_rounds(("onnxruntime", "openvino"), (13, 8, 6, 10)))
    assert sentence.startswith("Each in its fastest runtime: base.onnx in OpenVINO 8.0")
    assert "int8.onnx in ONNX Runtime 6.0" in sentence
    assert ": 1.3" in sentence
    assert sentence.endswith("faster.")
    assert describe_fastest(make_rounds(("onnxruntime", "openvino"), (13, 8, 8, 9)))[0].endswith("within noise.")


def test_what_does_not_run_has_a_row_and_a_reason():
    failure = Failure(str(MODELS[1]), "openvino", "OpenVINO cannot load it (too odd)")
    rounds = replace(make_rounds(), failures=(failure,))
    assert describe_failures(rounds) == ["int8.onnx does not run in OpenVINO: OpenVINO cannot load it (too odd)."]
    text = benchmark_markdown([rounds], [], "anyhow", {})
    assert "| int8.onnx | openvino | - | - | - | - | does not run |" in text
    assert "OpenVINO cannot load it (too odd)." in text
    assert "does not run" in printed(benchmark_table(rounds))


def test_markdown_has_every_combination_sizes_memory_and_machine():
    rounds = make_rounds(("onnxruntime", "openvino"), (13, 8, 6, 10))
    machine = {"cpu": "Some CPU", "flags": ["avx2", "amx_int8"], "cores": 2, "openvino": None}
    text = benchmark_markdown([rounds, rounds], FOOTPRINTS, "at 1x3x640x640", machine)
    assert text.count("## 1x3x640x640") == 2
    assert text.count("Each in its fastest runtime") == 2
    assert "| int8.onnx | openvino | 0.43 | 98.8 |" in text
    assert "Memory: at 1x3x640x640." in text
    assert "- flags: avx2, amx_int8\n" in text
    assert "openvino: None" not in text
    assert "98.8" in printed(footprint_table(FOOTPRINTS, "memory"))
