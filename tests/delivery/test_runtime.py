import dataclasses
import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from retinaface.delivery.export import METADATA_KEY
from retinaface.delivery.runtime import load_detector
from retinaface.errors import InputError
from retinaface.model.network import normalize


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def detectors(checkpoint_files, onnx_files):
    files = checkpoint_files | {f"{name}.onnx": path for name, path in onnx_files.items()}
    return {name: load_detector(path) for name, path in files.items()}


@pytest.mark.parametrize("size", [(120, 170), (64, 64), (20, 30), (1, 1), (300, 7)])
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
