import dataclasses
import importlib.util
import json
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from retinaface.delivery.export import METADATA_KEY
from retinaface.delivery.runtime import Detector, TorchRuntime, load_detector
from retinaface.errors import InputError
from retinaface.model.anchors import make_anchors
from retinaface.model.network import NetworkConfig, normalize, pad_small

ROOT = Path(__file__).parents[2]

needs_openvino = pytest.mark.skipif(
    not importlib.util.find_spec("openvino"), reason="OpenVINO is optional: pip install openvino"
)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def detectors(checkpoint_files, onnx_files):
    files = checkpoint_files | {f"{name}.onnx": path for name, path in onnx_files.items()}
    return {name: load_detector(path) for name, path in files.items()}


@pytest.mark.parametrize("size", [(120, 170), (64, 64), (20, 30), (1, 1), (300, 7)])
def test_every_format_of_one_network_gives_the_same(detectors, size):
    images = pad_small(normalize(torch.from_numpy(picture(*size)).permute(2, 0, 1)[None]))
    public, ours, exported = (detectors[name].run(images) for name in ("public", "float", "float.onnx"))
    assert all(torch.equal(a, b) for a, b in zip(ours, public, strict=True))
    for found, wanted in zip(exported, public, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# Not 300x7, of which most is padding: there an untrained network gives many neighbours scores that are equal up to the
# last bit, and which of them suppresses which is chance.
@pytest.mark.parametrize("size", [(120, 170), (64, 64), (20, 30), (1, 1)])
def test_every_format_of_one_network_finds_the_same(detectors, size):
    image = picture(*size)
    found = {name: detectors[name].detect(image, score_threshold=0.3) for name in ("public", "float", "float.onnx")}
    wanted = found["public"]
    assert len(wanted.scores) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found["float"], wanted, strict=True))
    faces = found["float.onnx"]
    torch.testing.assert_close(faces.scores, wanted.scores, rtol=0, atol=1e-4)
    nearest = torch.cdist(faces.boxes, wanted.boxes).argmin(dim=1)  # near-equal scores may change places
    torch.testing.assert_close(faces.boxes, wanted.boxes[nearest], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(faces.landmarks, wanted.landmarks[nearest], rtol=1e-3, atol=1e-2)
    assert len(set(nearest.tolist())) == len(nearest)


def test_names_of_runtimes(detectors):
    assert {name: detector.runtime for name, detector in detectors.items()} == {
        "public": "torch",
        "float": "torch",
        "pruned": "torch",
        "int8": "torch",
        "float.onnx": "onnxruntime",
        "int8.onnx": "onnxruntime",
    }
    configs = [dataclasses.asdict(detector.config) for detector in detectors.values()]
    assert all([list(sizes) for sizes in c["anchor_sizes"]] == [[16, 32], [64, 128], [256, 512]] for c in configs)


def test_simulated_and_real_int8_agree(detectors):
    """Up to values on the edge of a rounding step: a part of what rounding costs at all."""
    images = normalize(torch.from_numpy(picture(96, 128)).permute(2, 0, 1)[None])
    outputs = zip(*(detectors[name].run(images) for name in ("pruned", "int8", "int8.onnx")), strict=True)
    for exact, simulated, real in outputs:
        assert (simulated - real).abs().mean() < 0.6 * (exact - simulated).abs().mean()


def test_a_picture_can_be_a_view(detectors):
    image = picture(80, 90)
    mirrored = detectors["float"].detect(image[:, ::-1], 0.3)
    copied = detectors["float"].detect(image[:, ::-1].copy(), 0.3)
    assert all(torch.equal(a, b) for a, b in zip(mirrored, copied, strict=True))


def test_limits_are_passed_on(detectors):
    image = picture(120, 170)
    everything = detectors["float"].detect(image, 0.02, 0.9)
    assert len(detectors["float"].detect(image, 0.02, 0.9, keep=3).scores) == 3
    assert len(detectors["float"].detect(image, 0.02, 0.9, top_k=5).scores) <= 5 < len(everything.scores)
    assert (detectors["float"].detect(image, 0.6).scores >= 0.6).all()


@pytest.mark.parametrize(
    ("name", "weight_bits", "saturates", "warned"),
    [("int8", 8, True, True), ("int8", 7, True, False), ("int8", 8, False, False), ("float", None, True, False)],
)
def test_weights_of_8_bits_where_int8_saturates(
    onnx_files, tmp_path, monkeypatch, name, weight_bits, saturates, warned
):
    model = onnx.load(onnx_files[name])
    facts = json.loads(model.metadata_props[0].value)
    if weight_bits:
        facts["weight_bits"] = weight_bits
    model.metadata_props[0].value = json.dumps(facts)
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.setattr("retinaface.delivery.runtime.saturates_int8", lambda: saturates)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            load_detector(tmp_path / "model.onnx")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == warned
    assert all("model.onnx" in message and "weight_bits: 7" in message for message in messages)
    assert all(warning.filename == __file__ for warning in caught)


def other_onnx(path, metadata=None):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=10,
    )
    if metadata is not None:
        helper.set_model_props(model, {METADATA_KEY: metadata})
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("absent.onnx", lambda path: None, "no such file"),
        ("folder.onnx", lambda path: path.mkdir(), "no such file"),
        ("text.onnx", lambda path: path.write_text("hello"), "ONNX Runtime cannot load it"),
        ("other.onnx", other_onnx, "has no anchors in its metadata"),
        ("broken.onnx", lambda path: other_onnx(path, "{"), "has no anchors in its metadata"),
        ("older.onnx", lambda path: other_onnx(path, '{"anchors": 3}'), "has no anchors in its metadata"),
        ("text.pth", lambda path: path.write_text("hello"), "not a checkpoint"),
    ],
)
def test_files_that_are_no_detector(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        load_detector(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


# Several pictures


@pytest.fixture(params=["float", "int8", "float.onnx", pytest.param("openvino", marks=needs_openvino)])
def detector(request, detectors, onnx_files):
    """One of each runtime, and of simulated INT8."""
    if request.param == "openvino":
        return load_detector(onnx_files["float"], 1, runtime="openvino")
    return detectors[request.param]


def assert_same(found, wanted):
    """Sums in another order differ in the last bits."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for name, value, reference in zip(ours._fields, ours, theirs, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


def test_several_pictures_of_one_size_give_what_they_give_one_by_one(detector):
    pictures = [picture(70, 100, seed) for seed in range(3)]
    found = detector.detect_batch(pictures, 0.3)
    assert_same(found, [detector.detect(each, 0.3) for each in pictures])
    assert len({len(faces.scores) for faces in found}) > 1
    assert detector.detect_batch([]) == []


def test_callers_at_once_get_what_they_get_one_after_the_other(detector):
    pictures = [picture(60 + seed, 200 - 10 * seed, seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: detector.detect(each, 0.3), pictures))
    assert_same(found, [detector.detect(each, 0.3) for each in pictures])
    assert all(len(faces.scores) for faces in found)


@pytest.mark.parametrize(
    ("options", "cpus", "threads", "callers"),
    [
        ({}, 3, 3, 1),
        ({"many": True}, 3, 1, 3),
        ({"many": True}, 40, 5, 8),
        ({"many": True, "threads": 2}, 3, 2, 1),
        ({"many": True, "providers": ["CPU"]}, 3, 3, 1),
    ],
)
def test_many_pictures_are_shared_by_callers(onnx_files, monkeypatch, options, cpus, threads, callers):
    opened = []
    monkeypatch.setattr("retinaface.delivery.runtime.usable_cpus", lambda: cpus)
    monkeypatch.setattr("retinaface.delivery.runtime.open_session", lambda _, count, **__: opened.append(count))
    assert load_detector(onnx_files["float"], **options).callers == callers
    assert opened == [threads]


def test_a_network_runs_once_before_several_callers_can(tiny_network):
    """A fake-quantized one changes itself in its first run, see ``FakeQuantizedRetinaFace``."""
    runs = []
    tiny_network.register_forward_hook(lambda *_: runs.append(threading.current_thread()))
    TorchRuntime(tiny_network, torch.device("cpu"))
    assert runs == [threading.current_thread()]


def finds_every_anchor(images):
    """Outputs with a face where every anchor is, of a score of its own."""
    count = len(make_anchors(*images.shape[2:], NetworkConfig().anchor_sizes, NetworkConfig().strides))
    logits = torch.zeros(len(images), count, 2)
    logits[..., 1] = torch.arange(count) / count
    return logits, torch.zeros(len(images), count, 4), torch.zeros(len(images), count, 10)


def test_pictures_of_several_sizes_have_the_anchors_and_pixels_that_they_have_alone():
    detector = Detector(NetworkConfig(), finds_every_anchor, "torch")
    pictures = [picture(70, 130), picture(100, 90), picture(30, 40)]
    found = detector.detect_batch(pictures, 0.4, nms_threshold=1.0)
    for faces, image in zip(found, pictures, strict=True):
        alone = detector.detect(image, 0.4, nms_threshold=1.0)
        assert len(alone.boxes) > 50
        for ours, theirs in ((faces.boxes, alone.boxes), (faces.landmarks[:, 0], alone.landmarks[:, 0])):
            rows, wanted = (sorted(map(tuple, (each * 100).round().int().tolist())) for each in (ours, theirs))
            np.testing.assert_allclose(rows, wanted, atol=1)  # hundredths of a pixel


def test_a_file_of_a_fixed_size(onnx_files, tmp_path):
    model = onnx.load(onnx_files["float"])
    for dimension, value in zip(model.graph.input[0].type.tensor_type.shape.dim, (2, 3, 96, 128), strict=True):
        dimension.dim_value = value
    onnx.save(model, tmp_path / "fixed.onnx")
    fixed, free = load_detector(tmp_path / "fixed.onnx"), load_detector(onnx_files["float"])
    assert (fixed.batch, fixed.size) == (2, (96, 128))
    assert (free.batch, free.size) == (None, None)
    pictures = [picture(96, 128, seed) for seed in range(3)]
    assert_same(fixed.detect_batch(pictures, 0.3), free.detect_batch(pictures, 0.3))
    assert_same([fixed.detect(pictures[0], 0.3)], [free.detect(pictures[0], 0.3)])
    large = np.repeat(np.repeat(pictures[0], 3, axis=0), 3, axis=1)  # shrinks to what it was
    (found,), wanted = fixed.detect_batch([large], 0.3), free.detect(pictures[0], 0.3)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes, wanted.boxes * 3, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.landmarks, wanted.landmarks * 3, rtol=1e-3, atol=1e-2)


# Runtimes


@needs_openvino
def test_openvino_computes_what_onnxruntime_does(detectors, onnx_files):
    detector = load_detector(onnx_files["float"], 1, runtime="openvino")
    assert detector.runtime == "openvino"
    images = normalize(torch.from_numpy(picture(96, 128)).permute(2, 0, 1)[None])
    for ours, theirs in zip(detector.run(images), detectors["float.onnx"].run(images), strict=True):
        # On some CPUs it computes in bfloat16, which has 8 bits; layers add up.
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.std()))


@needs_openvino
def test_signals_are_heard_after_models_of_openvino(onnx_files):
    code = """
import os, signal, sys
from pathlib import Path
from retinaface.delivery.session import compile_for_openvino
models = [compile_for_openvino(Path(sys.argv[1])) for _ in range(2)]
while models:
    models.pop(0)
signal.signal(signal.SIGINT, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGINT)
"""
    command = [sys.executable, "-c", code, str(onnx_files["float"])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "heard\n"), result.stderr


def test_providers_go_by_any_of_their_names(onnx_files):
    for names in (["CPU"], ["cpuexecutionprovider"], ["CPUExecutionProvider"]):
        assert load_detector(onnx_files["float"], providers=names).runtime == "onnxruntime"


def test_providers_that_are_not_there(onnx_files, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        InputError, match=r"provider cuda: the installed ONNX Runtime comes without it; .*onnxruntime-gpu"
    ):
        load_detector(onnx_files["float"], providers=["cuda"])
    with pytest.raises(InputError, match=r"provider CANN: .*install a build of ONNX Runtime with it"):
        load_detector(onnx_files["float"], providers=["CANN"])
    with pytest.raises(InputError, match=r"provider Toaster: ONNX Runtime knows none .*expected one of .*CPU, CUDA"):
        load_detector(onnx_files["float"], providers=["Toaster"])
    # ONNX Runtime goes on without a provider whose libraries are absent.
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    session = ort.InferenceSession(onnx_files["float"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: session)
    with pytest.raises(InputError, match=r"float.onnx: ONNX Runtime could not start CUDAExecutionProvider"):
        load_detector(onnx_files["float"], providers=["CUDA", "CPU"])


def test_openvino_that_is_not_there(onnx_files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"float.onnx: OpenVINO is not installed; run `pip install openvino`"):
        load_detector(onnx_files["float"], runtime="openvino")


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_devices_that_are_not_there(checkpoint_files, device):
    with pytest.raises(InputError, match=f"device {device}: torch cannot use it") as error:
        load_detector(checkpoint_files["float"], device=device)
    assert "\n" not in str(error.value)


@needs_openvino
def test_devices_that_openvino_does_not_have(onnx_files):
    with pytest.raises(InputError, match=r"device toaster: OpenVINO finds none .*CPU"):
        load_detector(onnx_files["float"], runtime="openvino", device="toaster")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("float.onnx", {"runtime": "torch"}, "torch does not run ONNX files"),
        ("float", {"runtime": "onnxruntime"}, "onnxruntime runs ONNX files only; .*retinaface export"),
        ("float", {"runtime": "openvino"}, "openvino runs ONNX files only"),
        ("float", {"providers": ["CPU"]}, "only ONNX Runtime has any"),
        ("float.onnx", {"runtime": "openvino", "providers": ["CPU"]}, "only ONNX Runtime has any"),
        ("float.onnx", {"device": "cuda"}, "choose providers"),
        ("float", {"threads": 0}, "threads: expected at least 1, found 0"),
    ],
)
def test_options_that_do_not_fit_are_not_passed_over(checkpoint_files, onnx_files, name, options, message):
    name, _, suffix = name.partition(".")
    with pytest.raises(InputError, match=message):
        load_detector((onnx_files if suffix else checkpoint_files)[name], **options)


def test_files_of_other_forms(onnx_files, tmp_path):
    model = onnx.load(onnx_files["float"])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node.insert(0, helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT))
    for node in model.graph.node[1:]:
        node.input[:] = ["floats" if name == "images" else name for name in node.input]
    onnx.save(model, tmp_path / "uint8.onnx")
    with pytest.raises(
        InputError, match=r"uint8.onnx: takes uint8 and gives class_logits, .*expected a file that takes"
    ):
        load_detector(tmp_path / "uint8.onnx")
    model = onnx.load(onnx_files["float"])
    del model.graph.output[2]
    onnx.save(model, tmp_path / "two.onnx")
    with pytest.raises(InputError, match=r"two.onnx: takes float and gives class_logits, box_deltas; expected"):
        load_detector(tmp_path / "two.onnx")


def test_threads_of_torch_are_those_of_the_process(checkpoint_files, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    load_detector(checkpoint_files["float"])
    load_detector(checkpoint_files["float"], 3)
    assert chosen == [3]
