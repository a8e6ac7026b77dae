import json
import tomllib
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.compression.structure import load_float_network
from retinaface.data.annotations import read_image
from retinaface.delivery import export as under_test
from retinaface.delivery.export import METADATA_KEY, OPSET, OUTPUT_NAMES, _to_onnx, export_onnx, recorded_facts
from retinaface.delivery.onnx_forms import OnnxForm, OnnxSettings
from retinaface.delivery.runtime import load_detector
from retinaface.errors import InputError
from retinaface.evaluation.int8_share import convolutions_in_int8
from retinaface.model.network import normalize
from retinaface.model.postprocess import postprocess


@pytest.fixture(scope="module")
def network(build_network):
    return build_network(channels=16)


@pytest.fixture
def file(onnx_files):
    return onnx_files["float"]


def test_batch_norms_are_folded_also_where_several_gpus_have_shared_them(build_network):
    network = build_network(channels=16)
    shared = TorchSyncBatchNorm()
    synchronised = shared.revert(shared.apply(deepcopy(network)))  # what is left when a training has ended
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronised.modules())
    folded = under_test._with_folded_batch_norms(OnnxForm(synchronised.eval(), network.config, OnnxSettings()))
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    images = torch.rand(1, 3, 64, 64) * 255 - 110
    with torch.no_grad():
        torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-4)


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
    monkeypatch.setattr("retinaface.delivery.export._to_onnx", lambda form: onnx.ModelProto.FromString(content))
    network = deepcopy(compressed.int8)
    export_onnx(network, tmp_path / "onnxruntime.onnx")
    network.settings = replace(network.settings, backend="tensorrt")
    with pytest.raises(RuntimeError, match="not in TensorRT's form"):
        export_onnx(network, tmp_path / "tensorrt.onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["onnxruntime.onnx"]


def test_outputs_are_put_in_shape_without_computing_it(file):
    graph = onnx.load(file).graph
    made_of = {name: node for node in graph.node for name in node.output}
    reshapes = [made_of.get(node.input[1]) for node in graph.node if node.op_type == "Reshape"]
    computed = [node for node in reshapes if node is not None and node.op_type != "Constant"]
    assert len(reshapes) >= 9  # three outputs of three levels
    assert not computed


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


# Forms


FACES = OnnxSettings("end_to_end", "uint8", score_threshold=0.3)


def facts_of(file):
    return json.loads(onnx.load(file).metadata_props[0].value)


def run(file, images):
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {"images": images.numpy()})
    return dict(zip(names, map(torch.from_numpy, arrays), strict=True))


def assert_same_faces(found, wanted):
    torch.testing.assert_close(found["scores"], wanted.scores, rtol=0, atol=1e-4)
    if not len(wanted.scores):
        return
    nearest = torch.cdist(found["boxes"], wanted.boxes).argmin(dim=1)  # equal scores may change places
    assert len(set(nearest.tolist())) == len(nearest) == len(wanted.scores)
    torch.testing.assert_close(found["boxes"], wanted.boxes[nearest], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found["landmarks"], wanted.landmarks[nearest], rtol=1e-4, atol=1e-2)


def exported_as(model):
    """Stands in for the export itself, which takes seconds."""
    content = model.SerializeToString()
    return lambda form: onnx.ModelProto.FromString(content)


@pytest.fixture(scope="module")
def every_step(network):
    """The network with all steps, from uint8 to faces, and the outputs of each."""
    return _to_onnx(OnnxForm(network, network.config, FACES))


@pytest.fixture(scope="module")
def faces_file(network, every_step, tmp_path_factory):
    path = tmp_path_factory.mktemp("forms") / "faces.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retinaface.delivery.export._to_onnx", exported_as(every_step))
        export_onnx(network, path, FACES)
    return path


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 33, 101), (2, 3, 160, 97)])
def test_faces_are_those_of_postprocess_for_any_batch_height_and_width(network, faces_file, shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    found = run(faces_file, images)
    with torch.no_grad():
        wanted = postprocess(network(normalize(images)), shape[2:], network.config, 0.3, 0.4)
    assert sum(len(faces.scores) for faces in wanted) > 3 * len(images)
    assert found["picture_index"].tolist() == [picture for picture, faces in enumerate(wanted) for _ in faces.scores]
    for picture, faces in enumerate(wanted):
        here = found["picture_index"] == picture
        assert_same_faces({name: found[name][here] for name in faces._fields}, faces)


def test_pictures_as_programs_have_them(network, tmp_path):
    export_onnx(network, tmp_path / "x.onnx", OnnxSettings(input="rgb"))
    assert facts_of(tmp_path / "x.onnx")["input"]["layout"] == "batch, height, width, channel"
    assert facts_of(tmp_path / "x.onnx")["input"]["colours"] == "RGB"
    (taken,) = onnx.load(tmp_path / "x.onnx").graph.input
    assert [axis.dim_param or axis.dim_value for axis in taken.type.tensor_type.shape.dim] == [
        "batch",
        "height",
        "width",
        3,
    ]
    photo = np.random.default_rng(0).integers(0, 256, (2, 50, 81, 3), np.uint8)
    found = run(tmp_path / "x.onnx", torch.from_numpy(photo[..., ::-1].copy()))
    planes = torch.from_numpy(photo).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = network(normalize(planes))
        bgr = OnnxForm(network, network.config, OnnxSettings(input="bgr"))(torch.from_numpy(photo))
    for output, expected, of_bgr in zip(found.values(), wanted, bgr, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(of_bgr, expected)
    assert torch.equal(OnnxSettings(input="bgr").feed(planes), torch.from_numpy(photo))


def test_an_overlap_at_the_threshold_is_what_it_is_in_onnx(network):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 6]]])  # they overlap by 0.6, as float32 has it
    form = OnnxForm(network, network.config, OnnxSettings("end_to_end", nms_threshold=0.6))
    assert form.select((boxes, torch.tensor([[0.9, 0.8]]), torch.zeros(1, 2, 5, 2)))[1].tolist() == pytest.approx(
        [0.9, 0.8]
    )


def test_a_suppression_that_is_wrong_is_found_without_a_face(network, every_step, monkeypatch, tmp_path):
    monkeypatch.setattr("retinaface.delivery.export._to_onnx", exported_as(every_step))
    other = replace(FACES, nms_threshold=0.1, score_threshold=1)  # what it does as the file does is 0.4
    with pytest.raises(RuntimeError, match=r"x.onnx: boxes of ONNX Runtime differs from what torch makes"):
        export_onnx(network, tmp_path / "x.onnx", other)


def test_what_a_checkpoint_says_of_its_training(tmp_path):
    said = {"trained_on": "photos", "average_precision": {"all": 0.5}}
    torch.save({**said, "state_dict": {}}, tmp_path / "a.ckpt")
    torch.save({"trained_on": None, "average_precision": {}, "state_dict": {}}, tmp_path / "b.ckpt")
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "c.pth")
    assert [recorded_facts(tmp_path / name) for name in ("a.ckpt", "b.ckpt", "c.pth")] == [said, {}, {}]


def test_a_face_at_the_threshold_is_kept(network, every_step):
    # Two equal logits, as INT8 often has them, are a score of exactly one half.
    boxes, scores, landmarks = torch.tensor([[[0.0, 0, 9, 9]]]), torch.tensor([[0.5]]), torch.zeros(1, 1, 5, 2)
    for threshold, kept in ((0.5, [0.5]), (0.501, [])):
        form = OnnxForm(network, network.config, replace(FACES, score_threshold=threshold))
        assert form.select((boxes, scores, landmarks))[1].tolist() == kept
    # ONNX Runtime keeps what is above the threshold.
    (suppression,) = (node for node in every_step.graph.node if node.op_type == "NonMaxSuppression")
    constants = {constant.name: constant for constant in every_step.graph.initializer}
    below = onnx.numpy_helper.to_array(constants[suppression.input[4]]).item()
    assert below == np.nextafter(np.float32(0.3), np.float32(0))


def test_what_the_files_of_each_form_say(faces_file, file):
    model = onnx.load(faces_file)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "boxes": ["faces", 4],
        "scores": ["faces"],
        "landmarks": ["faces", 5, 2],
        "picture_index": ["faces"],
    }
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET] == [18]
    facts = facts_of(faces_file)
    assert (facts["form"], facts["input"]["type"], facts["input"]["subtract"]) == ("end_to_end", "uint8", [0, 0, 0])
    assert (facts["score_threshold"], facts["nms_threshold"], facts["keep"]) == (0.3, 0.4, 750)
    assert (facts["opset"], facts["licence"], facts["variances"]) == (18, "Apache-2.0", [0.1, 0.2])
    raw = facts_of(file)
    assert (raw["form"], raw["input"]["type"], raw["input"]["subtract"]) == ("raw", "float32", [104, 117, 123])
    assert not {"score_threshold", "trained_on", "average_precision"} & raw.keys()


def test_version_is_that_of_the_project(file):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert facts_of(file)["version"] == project["version"]
    assert facts_of(file)["licence"] == project["license"]


def test_decoded_of_a_fixed_size(network, tmp_path):
    settings = OnnxSettings("decoded", size=(97, 133), batch=2)
    path = tmp_path / "decoded.onnx"
    export_onnx(network, path, settings)
    model = onnx.load(path)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert not {"Shape", "Range"} & {node.op_type for node in model.graph.node}  # all that sizes say is a constant
    assert (facts_of(path)["size"], facts_of(path)["batch"]) == ([97, 133], 2)
    images = torch.rand(2, 3, 97, 133) * 255 - 110
    found = run(path, images)
    with torch.no_grad():
        wanted = postprocess(network(images), (97, 133), network.config, 0, 1)
    for picture, faces in enumerate(wanted):
        order = found["scores"][picture].argsort(descending=True)
        assert_same_faces({name: output[picture][order] for name, output in found.items()}, faces)
    with pytest.raises(Exception, match="invalid dimensions"):
        run(path, images[:1])


def with_wrong_overlap(model):
    node = next(node for node in model.graph.node if node.op_type == "NonMaxSuppression")
    constant = next(each for each in model.graph.initializer if each.name == node.input[3])
    constant.CopyFrom(onnx.numpy_helper.from_array(np.zeros(1, np.float32), constant.name))


def with_wrong_sides(model):
    next(node for node in model.graph.node if node.op_type == "Exp").op_type = "Sigmoid"


@pytest.mark.parametrize(("spoil", "output"), [(with_wrong_overlap, "boxes"), (with_wrong_sides, "anchor_boxes")])
def test_no_file_where_a_later_step_is_wrong(network, every_step, tmp_path, monkeypatch, spoil, output):
    model = onnx.ModelProto()
    model.CopyFrom(every_step)
    spoil(model)
    monkeypatch.setattr("retinaface.delivery.export._to_onnx", exported_as(model))
    with pytest.raises(RuntimeError, match=f"x.onnx: {output} of ONNX Runtime differs from what torch makes"):
        export_onnx(network, tmp_path / "x.onnx", FACES)
    assert list(tmp_path.iterdir()) == []


def test_photos_are_looked_at_too(network, quick_export, tmp_path, monkeypatch):
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.zeros((40, 90, 3), np.uint8))
    seen = []
    monkeypatch.setattr(under_test, "normalize", lambda pictures: seen.append(normalize(pictures)) or seen[-1])
    export_onnx(network, tmp_path / "x.onnx", photos=[photo])
    assert [tuple(images.shape) for images in seen] == [(1, 3, 64, 96), (2, 3, 160, 120), (1, 3, 64, 90)]
    assert seen[-1][0, :, 0, 0].tolist() == [-104, -117, -123]
    photo.write_text("no picture")
    with pytest.raises(InputError, match=r"photo.png: truncated or not a picture"):
        export_onnx(network, tmp_path / "y.onnx", photos=[photo])
    assert not (tmp_path / "y.onnx").exists()


@pytest.mark.parametrize(
    ("precision", "differences", "right"),
    [
        ("int8", [0, 1.4], True),
        ("int8", [1.4, 0], True),
        ("int8", [0.5, 1.4], False),
        ("int8", [2.1, *[0] * 7], False),
        ("float", [1.4, 0], False),
    ],
)
def test_int8_is_judged_by_the_mean_over_the_pictures_and_a_little_by_each(
    network, compressed, onnx_files, monkeypatch, precision, differences, right
):
    given = cycle(torch.tensor([[difference] * 3, [0.75] * 3]) for difference in differences)
    monkeypatch.setattr(under_test, "compare_outputs", lambda *_: next(given))
    checked = compressed.int8 if precision == "int8" else network
    form = OnnxForm(network, network.config, OnnxSettings())
    outcome = nullcontext() if right else pytest.raises(RuntimeError, match=r"class_logits .* differs from torch")
    with outcome:
        under_test._check_outputs(form, checked, onnx_files[precision], "it.onnx", [])


def test_training_data_and_accuracy_where_known(network, quick_export, tmp_path):
    export_onnx(network, tmp_path / "x.onnx", trained_on="wider_face", average_precision={"hard": 0.75})
    facts = facts_of(tmp_path / "x.onnx")
    assert (facts["trained_on"], facts["average_precision"]) == ("wider_face", {"hard": 0.75})
    assert load_detector(tmp_path / "x.onnx").config == network.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "cooked"}, "form is 'cooked'; expected one of raw, decoded, end_to_end"),
        ({"input": "grey"}, "input is 'grey'; expected one of normalized, uint8, bgr, rgb"),
        ({"size": (32, 640)}, "size is 32x640; expected height and width of 33 pixels or more"),
        ({"size": (640,)}, "size is 640; expected height and width"),
        ({"batch": 0}, "batch is 0; expected 1 or more"),
        ({"score_threshold": 1.5}, "score_threshold is 1.5; expected a number from 0 to 1"),
        ({"nms_threshold": -1}, "nms_threshold is -1; expected a number from 0 to 1"),
        ({"least_channels": 0}, "least_channels is 0; expected .*16 with AVX-512"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        OnnxSettings(**settings)


@pytest.mark.slow
@pytest.mark.reference
def test_faces_in_photos_are_those_of_the_detector(reference, tiny_root, tmp_path):
    network, _ = load_float_network(reference / "weights" / "mobilenet025_widerface.pth")
    photos = sorted((reference / "photos").glob("*.jpg"))
    export_onnx(network, tmp_path / "faces.onnx", OnnxSettings("end_to_end", "uint8"), photos)
    detector = load_detector(reference / "weights" / "mobilenet025_widerface.pth")
    counts = []
    for path in (*photos, next(tiny_root.rglob("*.jpg"))):  # it finds nothing in the last
        image = read_image(path)
        wanted = detector.detect(image)
        found = run(tmp_path / "faces.onnx", torch.from_numpy(image).permute(2, 0, 1)[None].contiguous())
        counts.append(len(wanted.scores))
        assert_same_faces(found, wanted)
    assert min(counts[:-1]) > 20 > counts[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("keep_float", "count"), [((), 56), (("backbone.*1",), 45)])
def test_int8_is_a_third_in_size_and_stays_int8_behind_uint8(build_network, tmp_path, keep_float, count):
    """Of mobilenet0.25 at its published width, everything in INT8, or as in the recipes."""
    network = build_network()
    prepared = prepare_for_training(network, QuantizationSettings(keep_float=keep_float, averaging=0.5)).train()
    with torch.no_grad():
        for _ in range(3):
            prepared(torch.rand(2, 3, 96, 128) * 255 - 110)
    export_onnx(network, tmp_path / "float.onnx")
    export_onnx(prepared.eval(), tmp_path / "int8.onnx")
    export_onnx(prepared, tmp_path / "faces.onnx", OnnxSettings("end_to_end", "uint8"))
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["int8"] <= 0.3 * sizes["float"]
    shares = [convolutions_in_int8(tmp_path / f"{name}.onnx") for name in ("int8", "faces")]
    assert [(share.int8, share.total) for share in shares] == [(count, 56)] * 2
