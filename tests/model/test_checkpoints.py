import pickle

import pytest
import torch

from retinaface.errors import InputError
from retinaface.model.checkpoints import load_imagenet_backbone, load_pretrained, read_torch_file
from retinaface.model.network import NetworkConfig, RetinaFace


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=["bare", "state_dict", "module.", "both", "before torch 0.4.1"],
)
def test_forms_of_public_files(tmp_path, build_network, wrap, public_state):
    network = build_network()
    torch.save(wrap(public_state(network)), tmp_path / "public.pth")
    loaded = load_pretrained(tmp_path / "public.pth")
    assert not loaded.training
    assert loaded.config == NetworkConfig(channels=64)
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_public_resnet50(tmp_path, build_network, public_state):
    network = build_network(backbone="resnet50", channels=16)
    torch.save(public_state(network), tmp_path / "public.pth")
    loaded = load_pretrained(tmp_path / "public.pth")
    assert (loaded.config.backbone, loaded.config.channels) == ("resnet50", 16)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(images), network(images), strict=True))


@pytest.mark.reference
def test_keys_of_the_public_files(reference, build_network, public_state):
    published = read_torch_file(reference / "weights" / "mobilenet025_widerface.pth")
    published = {key.removeprefix("module.") for key in published.get("state_dict", published)}
    ours = set(public_state(build_network()))
    assert {key for key in ours if "num_batches" not in key} == {key for key in published if "num_batches" not in key}


def test_missing_unexpected_and_misshaped_keys_are_named(tmp_path, tiny_network, public_state):
    state = public_state(tiny_network)
    del state["ssh1.conv3X3.0.weight"]
    state["ssh1.novelty"] = torch.zeros(1)
    state["BboxHead.2.conv1x1.bias"] = torch.zeros(6)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(InputError) as error:
        load_pretrained(tmp_path / "odd.pth")
    message = str(error.value)
    assert "\n" not in message
    assert "odd.pth" in message
    assert "1 missing (ssh.0.conv3.0.weight)" in message
    assert "1 unexpected (ssh1.novelty)" in message or "1 unexpected (ssh.0.novelty)" in message
    assert "1 mis-shaped (box_heads.2.bias (6,) instead of (8,))" in message


def test_long_lists_of_keys_are_cut(tmp_path, tiny_network, public_state):
    state = {key: value for key, value in public_state(tiny_network).items() if not key.startswith("ssh")}
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(InputError, match=r"75 missing \(.*, \.\.\.\)") as error:
        load_pretrained(tmp_path / "short.pth")
    assert len(str(error.value)) < 400


class Harmful:
    ran = False

    def __reduce__(self):
        return setattr, (Harmful, "ran", True)


def pickled(path):
    torch.save({"weights": Harmful()}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (pickled, "not a checkpoint that can be read safely"),
        (
            lambda path: path.write_bytes(pickle.dumps(Harmful(), protocol=2)),
            "not a checkpoint that can be read safely",
        ),
        (lambda path: path.write_bytes(b""), "not a checkpoint that can be read safely"),
        (lambda path: path.write_text("hello"), "not a checkpoint that can be read safely"),
        (lambda path: path.write_text("error: not found"), "not a checkpoint that can be read safely"),
        (lambda path: torch.save([1, 2], path), "holds no state dict"),
        (lambda path: torch.save({}, path), "holds no state dict"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no state dict"),
        (lambda path: torch.save({"fc.weight": torch.zeros(2)}, path), "not a RetinaFace checkpoint"),
    ],
    ids=["code", "plain pickle", "empty", "text", "error page", "list", "empty dict", "numbers", "another network"],
)
def test_files_that_are_no_checkpoint(tmp_path, write, message):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(path)
    assert "weights.pth" in str(error.value)
    assert "\n" not in str(error.value)
    assert not Harmful.ran


def test_truncated_and_absent_files(tmp_path, tiny_network, public_state):
    path = tmp_path / "weights.pth"
    torch.save(public_state(tiny_network), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="not a checkpoint"):
        load_pretrained(path)
    with pytest.raises(InputError, match="no such file"):
        read_torch_file(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="no such file"):
        read_torch_file(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_the_way_out_where_the_checkpoint_before_is_there(tmp_path, whole):
    path = tmp_path / "last.ckpt"
    torch.save({"weight": torch.randn(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if whole else content[: len(content) // 2])
    with pytest.raises(InputError) as error:
        read_torch_file(path)
    assert "previous" not in str(error.value)
    (tmp_path / "last.ckpt.previous").touch()
    with pytest.raises(InputError, match=r"; last\.ckpt\.previous is the one before"):
        read_torch_file(path)


@pytest.mark.parametrize("prefix", ["", "module.", "module.body.", "body."])
def test_backbone_weights(tmp_path, build_network, prefix):
    source = build_network().backbone.state_dict()
    torch.save(
        {"state_dict": {f"{prefix}{k}": v for k, v in source.items()} | {"fc.bias": torch.zeros(2)}}, tmp_path / "b"
    )
    network = RetinaFace()
    load_imagenet_backbone(network, tmp_path / "b")
    assert all(torch.equal(value, source[key]) for key, value in network.backbone.state_dict().items())


def test_backbone_weights_of_another_network(tmp_path, build_network):
    torch.save(build_network().backbone.state_dict(), tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"b.pth: does not fit"):
        load_imagenet_backbone(RetinaFace(NetworkConfig("resnet50")), tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"no mobilenet0.25 weights"):
        load_imagenet_backbone(RetinaFace(), "imagenet")


@pytest.mark.reference
def test_public_imagenet_backbone(reference):
    network = RetinaFace()
    file = reference / "weights" / "mobilenet025_imagenet.tar"
    load_imagenet_backbone(network, file)
    theirs = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(network.backbone.stage1[0][0].weight, theirs["module.stage1.0.0.weight"])
    assert torch.equal(network.backbone.stage3[1][4].running_var, theirs["module.stage3.1.4.running_var"])
