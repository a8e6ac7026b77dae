import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from retinaface.delivery.export import METADATA_KEY, OUTPUT_NAMES, export_onnx
from retinaface.errors import InputError


@pytest.fixture(scope="module")
def network(build_network):
    return build_network(channels=16)


@pytest.fixture
def file(onnx_files):
    return onnx_files["float"]


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 33, 101), (2, 3, 160, 96), (1, 3, 240, 47)])
def test_outputs_are_those_of_torch_for_any_batch_height_and_width(network, file, shape):
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.rand(shape) * 255 - 110
    with torch.no_grad():
        expected = network(images)
    for ours, theirs in zip(session.run(list(OUTPUT_NAMES), {"images": images.numpy()}), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-4)


def test_names_and_metadata(network, file):
    model = onnx.load(file)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == list(OUTPUT_NAMES)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    facts = json.loads(metadata[METADATA_KEY])
    assert facts["precision"] == "float32"
    assert facts["mean_bgr"] == [104, 117, 123]
    assert facts["network"]["anchor_sizes"] == [[16, 32], [64, 128], [256, 512]]
    assert facts["network"]["channels"] == 16
    assert not {"backend", "weight_bits"} & facts.keys()


def test_an_int8_file_says_what_it_was_made_for(onnx_files):
    facts = json.loads(onnx.load(onnx_files["int8"]).metadata_props[0].value)
    assert facts["precision"] == "int8"
    assert facts["backend"] == "onnxruntime"
    assert facts["weight_bits"] == 8


def test_no_two_convolutions_share_the_zero_points_of_their_weights(onnx_files):
    # ONNX Runtime's exact mode for CPUs without INT8 dot products would not load the file on such a CPU.
    graph = onnx.load(onnx_files["int8"]).graph
    weights = {constant.name for constant in graph.initializer if constant.data_type == onnx.TensorProto.INT8}
    zero_points = [node.input[2] for node in graph.node if node.input[0] in weights]
    assert len(zero_points) > 40
    assert len(set(zero_points)) == len(zero_points)


def test_only_files_for_tensorrt_have_to_be_in_its_form(compressed, onnx_files, tmp_path, monkeypatch):
    content = onnx.load(onnx_files["int8"])  # has zero points
    del content.metadata_props[:]
    content = content.SerializeToString()
    monkeypatch.setattr("retinaface.delivery.export._to_onnx", lambda graph: onnx.ModelProto.FromString(content))
    network = deepcopy(compressed.int8)
    export_onnx(network, tmp_path / "onnxruntime.onnx")
    network.settings = replace(network.settings, backend="tensorrt")
    with pytest.raises(RuntimeError, match="not in TensorRT's form"):
        export_onnx(network, tmp_path / "tensorrt.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["onnxruntime.onnx"]


def test_nothing_of_this_machine_is_in_the_file(file):
    content = file.read_bytes()
    for secret in (b"/home", b"/tmp", b"/root", b"site-packages", b"network.py", b'File "', b"stack_trace"):
        assert secret not in content, secret
    # The weights, and not much besides.
    assert (
        len(content) < 4 * sum(onnx.numpy_helper.to_array(w).size for w in onnx.load(file).graph.initializer) + 150_000
    )


def test_no_file_unless_it_is_right(network, file, quick_export, tmp_path, build_network):
    path = tmp_path / "old.onnx"
    path.write_bytes(b"what was there")
    other = build_network(channels=16)
    other.class_heads[1].bias.data += 5
    with pytest.raises(RuntimeError, match=r"old.onnx: class_logits of ONNX Runtime differs from torch"):
        export_onnx(other, path)
    assert path.read_bytes() == b"what was there"
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.onnx"]
    export_onnx(network.train(), path)
    assert network.training  # left as it was
    network.eval()
    assert path.read_bytes() == file.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.onnx"]


def test_outputs_that_are_no_numbers_are_not_right(network, quick_export, tmp_path, build_network):
    other = build_network(channels=16)
    other.box_heads[0].bias.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="box_deltas"):
        export_onnx(other, tmp_path / "x.onnx")


def test_places_that_cannot_be_written(network, quick_export, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"x.onnx: cannot be written"):
        export_onnx(network, tmp_path / "file" / "x.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(InputError, match=r"folder.onnx: cannot be written"):
        export_onnx(network, tmp_path / "folder.onnx")
