import sys
import time
from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch

from retinaface.errors import InputError
from retinaface.evaluation import raw_call as module
from retinaface.evaluation.raw_call import RawCall, prepare, usable_runtimes


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.onnx"
    text = '<ir_version: 10, opset_import: ["": 17]> g (float[b,3,h,w] photo) => (float[b,3,h,w] x) {x = Tanh(photo)}'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_the_call_is_timed_but_not_the_rest_after_it():
    call = RawCall(lambda: time.sleep(0.02), rest=0.05)
    start = time.perf_counter()
    taken = call.milliseconds()
    assert 20 <= taken < (time.perf_counter() - start) * 1000 - 45


def test_runtimes_give_the_same_raw_outputs(onnx_file):
    pytest.importorskip("openvino")
    ours = prepare(onnx_file, "onnxruntime", 64, 2, 1).run()
    theirs = list(prepare(onnx_file, "openvino", 64, 2, 1).run().values())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert abs(mine - other).max() < 0.05 * abs(mine).max()  # OpenVINO may compute in bfloat16


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_inputs_are_those_that_the_runtime_names(onnx_file, tmp_path, runtime, monkeypatch):
    pytest.importorskip(runtime)
    fixed = onnx.load(onnx_file)
    for axis, length in zip(fixed.graph.input[0].type.tensor_type.shape.dim, (1, 3, 32, 64), strict=True):
        axis.dim_value = length
    onnx.save(fixed, tmp_path / "fixed.onnx")
    whole = '<ir_version: 10, opset_import: ["": 17]> g (int64[b,3,h,w] photo) => (int64[b,3,h,w] x) {x = Abs(photo)}'
    onnx.save(onnx.parser.parse_model(whole), tmp_path / "whole.onnx")
    monkeypatch.setattr(onnx, "load", None)  # the file once more in memory would count as the model's
    assert prepare(onnx_file, runtime, 64, 2, 1).run()[0].shape == (2, 3, 64, 64)
    with pytest.raises(InputError, match=r"fixed.onnx: takes inputs of \[1, 3, 32, 64\] only, not \[1, 3, 64, 64\]"):
        prepare(tmp_path / "fixed.onnx", runtime, 64, 1, 1)
    with pytest.raises(InputError, match=r"expected one image input \(batch, 3, height, width\), found photo .*64"):
        prepare(tmp_path / "whole.onnx", runtime, 64, 1, 1)


def test_a_checkpoint_runs_in_torch_which_is_left_time_to_come_to_rest(tiny_checkpoint):
    threads = torch.get_num_threads()
    try:
        call = prepare(tiny_checkpoint, "torch", 64, 2, 1)
        assert [tuple(output.shape) for output in call.run()] == [(2, 168, 2), (2, 168, 4), (2, 168, 10)]
        assert torch.get_num_threads() == 1
        assert call.rest > 0
    finally:
        torch.set_num_threads(threads)


def test_a_model_in_a_runtime_for_other_files_is_refused(onnx_file, tiny_checkpoint):
    with pytest.raises(InputError, match=r"small\.onnx: torch runs checkpoints .* only"):
        prepare(onnx_file, "torch", 64, 1, 1)
    with pytest.raises(InputError, match=r"onnxruntime runs ONNX files .* only"):
        prepare(tiny_checkpoint, "onnxruntime", 64, 1, 1)


def test_openvino_is_used_where_it_is_installed(onnx_file, monkeypatch):
    models = [Path("a.onnx"), Path("b.ckpt")]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert usable_runtimes(models) == ["onnxruntime", "openvino", "torch"]
    assert usable_runtimes(models[:1]) == ["onnxruntime", "openvino"]
    assert usable_runtimes(models[1:]) == ["torch"]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert usable_runtimes(models) == ["onnxruntime", "torch"]


def test_openvino_that_is_absent_is_refused_with_the_remedy(onnx_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"OpenVINO is not installed; run `pip install openvino`"):
        prepare(onnx_file, "openvino", 64, 1, 1)
