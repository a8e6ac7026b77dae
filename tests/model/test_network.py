import cv2
import numpy as np
import pytest
import torch
from torch import nn

from retinaface.data.annotations import read_image
from retinaface.errors import InputError
from retinaface.model.anchors import make_anchors
from retinaface.model.checkpoints import load_pretrained
from retinaface.model.network import NetworkConfig, RetinaFace, matching_modules, normalize
from retinaface.model.postprocess import postprocess

BACKBONES = ("mobilenet0.25", "resnet50")


def as_batch(image):
    return normalize(torch.from_numpy(image).permute(2, 0, 1)[None])


@pytest.fixture(scope="module")
def published(reference):
    return load_pretrained(reference / "weights" / "mobilenet025_widerface.pth")


@pytest.mark.reference
def test_raw_outputs_are_those_of_the_reference_implementation(reference, published):
    golden = np.load(reference / "golden" / "mobilenet025.npz")
    image = cv2.imread(str(reference / "golden" / "crop.png"))
    with torch.no_grad():
        class_logits, box_deltas, landmark_deltas = published(as_batch(image))
    config = published.config
    anchors = make_anchors(*image.shape[:2], config.anchor_sizes, config.strides)
    for ours, theirs in (
        (class_logits[0].softmax(-1), "scores"),
        (box_deltas[0], "box_deltas"),
        (landmark_deltas[0], "landmark_deltas"),
        (anchors, "priors_cxcywh"),
    ):
        np.testing.assert_allclose(ours.numpy(), golden[theirs], atol=1e-4, rtol=0, err_msg=theirs)


@pytest.mark.reference
def test_the_27_faces_of_the_reference_implementation(reference, published):
    golden = np.load(reference / "golden" / "mobilenet025.npz")
    image = read_image(reference / "photos" / "stadium_crowd.jpg")
    with torch.no_grad():
        outputs = published(as_batch(image))
    faces = postprocess(outputs, image.shape[:2], published.config)[0]
    assert len(faces.boxes) == 27
    np.testing.assert_allclose(faces.scores.numpy(), golden["photo_scores"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(faces.boxes.numpy(), golden["photo_boxes"], atol=1, rtol=0)
    np.testing.assert_allclose(faces.landmarks.flatten(1).numpy(), golden["photo_landmarks"], atol=1, rtol=0)


@pytest.mark.parametrize(
    ("backbone", "strides", "anchor_sizes"),
    [
        ("mobilenet0.25", (8, 16, 32), ((16, 32), (64, 128), (256, 512))),
        ("mobilenet0.25", (16, 32), ((8,), (16, 24, 32))),
        ("mobilenet0.25", (32,), ((64, 96),)),
        ("resnet50", (4, 8, 16, 32), ((8,), (16, 32), (64, 128), (256, 512))),
    ],
)
def test_any_size_gives_as_many_outputs_as_anchors(build_network, backbone, strides, anchor_sizes):
    network = build_network(backbone=backbone, channels=16, strides=strides, anchor_sizes=anchor_sizes)
    for batch, *size in ((2, 33, 47), (1, 64, 64), (3, 101, 38)):
        with torch.no_grad():
            outputs = network(torch.zeros(batch, 3, *size))
        count = len(make_anchors(*size, anchor_sizes, strides))
        assert [tuple(output.shape) for output in outputs] == [(batch, count, width) for width in (2, 4, 10)]


def test_outputs_and_anchors_are_in_the_same_order(build_network):
    """A head that answers with the position of its receptive field answers with the anchors' centres."""
    network = build_network(strides=(16, 32), anchor_sizes=((16, 32, 48), (64,)), channels=16)
    height, width = 64, 96
    maps = []
    for stride, sizes in zip(network.config.strides, network.config.anchor_sizes, strict=True):
        rows, columns = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        answer = torch.zeros(1, len(sizes), 4, *rows.shape)
        answer[:, :, 0] = (columns + 0.5) * stride / width
        answer[:, :, 1] = (rows + 0.5) * stride / height
        for index, size in enumerate(sizes):
            answer[:, index, 2] = size / width
            answer[:, index, 3] = size / height
        maps.append(answer.flatten(1, 2))
    for head, answer in zip(network.box_heads, maps, strict=True):
        head.forward = lambda _, answer=answer: answer
    with torch.no_grad():
        box_deltas = network(torch.zeros(1, 3, height, width))[1]
    anchors = make_anchors(height, width, network.config.anchor_sizes, network.config.strides)
    torch.testing.assert_close(box_deltas[0], anchors)


def test_a_picture_gives_the_same_alone_and_in_a_batch(tiny_network):
    images = torch.rand(3, 3, 40, 56) * 255 - 110
    with torch.no_grad():
        together = tiny_network(images)
        alone = [tiny_network(image[None]) for image in images]
    for output, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(output, torch.cat(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_place_has_its_own_activation_module(backbone):
    network = RetinaFace(NetworkConfig(backbone))
    calls = []
    for module in network.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) > 30


def test_relu_instead_of_leaky_relu():
    kinds = {type(module) for module in RetinaFace(NetworkConfig(activation="relu")).modules()}
    assert nn.ReLU in kinds
    assert nn.LeakyReLU not in kinds


def test_relu_but_where_leaky_relu_is_kept():
    published, changed = (
        {name: type(module) for name, module in network.named_modules() if isinstance(module, nn.ReLU | nn.LeakyReLU)}
        for network in (RetinaFace(), RetinaFace(NetworkConfig(activation="relu", keep_leaky_relu=["backbone.*1"])))
    )
    assert changed.keys() == published.keys()
    leaky = {name for name, kind in changed.items() if kind is nn.LeakyReLU}
    assert leaky == {name for name in published if name.startswith("backbone.stage1.")}
    assert all(published[name] is nn.LeakyReLU for name in leaky)


def test_export_with_dynamic_batch_height_and_width(tiny_network):
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    exported = torch.export.export(tiny_network, (torch.zeros(2, 3, 96, 128),), dynamic_shapes=shapes).module()
    for shape in ((1, 3, 64, 64), (3, 3, 101, 75)):
        images = torch.rand(shape) * 255 - 110
        with torch.no_grad():
            for ours, theirs in zip(tiny_network(images), exported(images), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_subtracts_the_mean_of_blue_green_red(dtype):
    images = torch.tensor([104, 117, 123], dtype=dtype).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    normal = normalize(images)
    assert normal.dtype == torch.float32
    assert torch.equal(normal, torch.zeros(2, 3, 4, 5))
    assert torch.equal(normalize(torch.full((1, 3, 1, 1), 255, dtype=dtype)).flatten(), torch.tensor([151.0, 138, 132]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backbone": "vgg"}, "backbone is 'vgg'"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"strides": (8, 32, 64)}, r"strides are \[8, 32, 64\]"),
        ({"strides": ()}, "strides are"),
        ({"strides": (16, 8, 4)}, "strides are"),
        ({"strides": (4, 8)}, "strides are"),  # the layers behind would be built for nothing
        ({"strides": (8, 32)}, "strides are"),
        ({"anchor_sizes": ((16,), (32,))}, "2 lists of anchor sizes for 3 strides"),
        ({"anchor_sizes": ((16,), (), (32,))}, "non-empty"),
        ({"channels": 30}, "channels is 30"),
        ({"channels": -4}, "channels is -4"),
    ],
)
def test_a_config_that_cannot_be_built_is_explained(config, message):
    with pytest.raises(InputError, match=message):
        NetworkConfig(**config)


@pytest.mark.parametrize(
    ("backbone", "pattern", "expected"),
    [
        ("mobilenet0.25", "backbone.*1", ["backbone.stage1"]),
        ("resnet50", "backbone.*1", ["backbone.conv1", "backbone.bn1", "backbone.layer1"]),
        ("mobilenet0.25", "backbone", ["backbone"]),
        ("mobilenet0.25", "backbone.stage?.0", [f"backbone.stage{stage}.0" for stage in (1, 2, 3)]),
        ("mobilenet0.25", "*_heads.[01]", [f"{h}_heads.{n}" for h in ("class", "box", "landmark") for n in (0, 1)]),
        ("mobilenet0.25", "ssh.*", ["ssh.0", "ssh.1", "ssh.2"]),
    ],
)
def test_wildcards_stand_for_part_of_a_name_between_dots(build_network, backbone, pattern, expected):
    found = matching_modules(build_network(backbone=backbone, channels=16), [pattern], "keep")
    assert sorted(found) == sorted(expected)


def test_every_pattern_must_match_a_module(tiny_network):
    found = matching_modules(tiny_network, ["ssh.*", "fpn", "ssh.0"], "keep")
    assert set(found) == {"ssh.0", "ssh.1", "ssh.2", "fpn"}
    assert matching_modules(tiny_network, [], "keep") == []
    for pattern in ("backbone.layer*", "*1", "stage1", "fpn.lateral.0.0.*", "SSH"):
        with pytest.raises(InputError) as error:
            matching_modules(tiny_network, ["fpn", pattern], "keep_float")
        assert f"keep_float names {pattern}" in str(error.value)
