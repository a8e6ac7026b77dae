import io

import pytest
import torch

from retinaface.compression.quantization import FakeQuantizedRetinaFace, QuantizationSettings
from retinaface.compression.structure import Structure, load_float_network, load_network, load_structure
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig, RetinaFace

IMAGES = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 255 - 110


def run(network):
    with torch.no_grad():
        return network(IMAGES)


def test_the_record_survives_a_file():
    structure = Structure(
        NetworkConfig(
            activation="relu",
            channels=16,
            anchor_sizes=[[8], [16, 24]],
            strides=[16, 32],
            keep_leaky_relu=["backbone.*1"],
        ),
        plans=[[("backbone.stage1.0.0", [1, 2])], [("fpn.merge.0.0", [3])]],
        quantization=QuantizationSettings(keep_float=("fpn",), averaging=0.1),
    )
    file = io.BytesIO()
    torch.save(structure.to_plain(), file)
    file.seek(0)
    assert Structure.from_plain(torch.load(file, weights_only=True)) == structure
    plain = Structure()
    assert Structure.from_plain(plain.to_plain()) == plain


def test_checkpoints_of_every_stage(checkpoint_files, compressed, tiny_network):
    expected = run(tiny_network)
    public, structure = load_network(checkpoint_files["public"])
    assert structure == Structure(NetworkConfig(channels=16))
    floats, structure = load_network(checkpoint_files["float"])
    assert structure.network == NetworkConfig(channels=16)
    for network in (public, floats):
        assert not network.training
        assert all(torch.equal(a, b) for a, b in zip(run(network), expected, strict=True))

    pruned, structure = load_network(checkpoint_files["pruned"])
    assert isinstance(pruned, RetinaFace)
    assert structure.plans == compressed.structure.plans
    assert all(torch.equal(a, b) for a, b in zip(run(pruned), run(compressed.pruned), strict=True))

    quantized, structure = load_network(checkpoint_files["int8"])
    assert isinstance(quantized, FakeQuantizedRetinaFace)
    assert structure == compressed.structure
    assert not quantized.training
    assert all(torch.equal(a, b) for a, b in zip(run(quantized), run(compressed.int8), strict=True))


def test_what_keeps_leaky_relu_is_as_in_the_file_unless_that_is_said(tmp_path, build_network, save_checkpoint):
    path = save_checkpoint(
        build_network(channels=16, activation="relu", keep_leaky_relu=["backbone.*1"]), tmp_path / "mixed.ckpt"
    )
    for given, expected in ((None, ("backbone.*1",)), ([], ()), (["fpn"], ("fpn",))):
        network, structure = load_float_network(path, "relu", given)
        assert structure.network.keep_leaky_relu == network.config.keep_leaky_relu == expected
    assert load_float_network(path)[1].network.keep_leaky_relu == ("backbone.*1",)


def test_a_network_to_go_on_with(checkpoint_files):
    network, structure = load_float_network(checkpoint_files["pruned"], activation="leaky_relu")
    same, _ = load_float_network(checkpoint_files["pruned"])
    assert structure.network.activation == network.config.activation == "leaky_relu"
    assert same.config.activation == "relu"
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in network.state_dict().items())
    assert not torch.equal(run(network)[0], run(same)[0])
    with pytest.raises(InputError, match=r"int8.ckpt: is quantized already"):
        load_float_network(checkpoint_files["int8"])


def damage_weights(content):
    del content["state_dict"]["network.class_heads.0.bias"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("state_dict"), "structure is damaged"),
        (lambda content: content.update(state_dict=[1]), "structure is damaged"),
        (lambda content: content.update(structure=3), "structure is damaged"),
        (lambda content: content["structure"].pop("plans"), "structure is damaged"),
        (lambda content: content["structure"].update(plans=[[("fpn", True)]]), "structure is damaged"),
        (lambda content: content["structure"].update(plans=[[("fpn", [1])]]), "structure is damaged.*fpn"),
        (lambda content: content["structure"]["network"].update(depth=3), "structure is damaged.*depth"),
        (lambda content: content["structure"]["network"].update(backbone="vgg"), "structure is damaged.*vgg"),
        (lambda content: content["structure"]["network"].update(channels=64), "does not fit this network"),
        (lambda content: content["structure"].update(plans=[]), "does not fit this network"),
        (damage_weights, r"1 missing \(class_heads.0.bias\)"),
    ],
)
def test_damaged_checkpoints(checkpoint_files, tmp_path, damage, message):
    content = torch.load(checkpoint_files["pruned"], weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(InputError, match=message) as error:
        load_network(tmp_path / "damaged.ckpt")
    assert "damaged.ckpt" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_a_quantized_structure(checkpoint_files, tmp_path):
    content = torch.load(checkpoint_files["int8"], weights_only=True)
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "class_heads.0.bias" not in k}
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(InputError, match=r"damaged.ckpt: the weights do not fit .*class_heads.0.bias"):
        load_network(tmp_path / "damaged.ckpt")


def test_a_changed_bit_is_noticed(checkpoint_files, tmp_path):
    """Torch would load it."""
    content = bytearray(checkpoint_files["pruned"].read_bytes())
    weights = torch.load(checkpoint_files["pruned"], weights_only=True)["state_dict"]
    largest = max(weights.values(), key=torch.Tensor.numel)
    content[content.index(largest.contiguous().numpy().tobytes()) + 3] ^= 64
    path = tmp_path / "changed.ckpt"
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == weights.keys()
    for load in (load_network, load_structure):
        with pytest.raises(InputError, match=r"changed.ckpt: damaged, its checksums do not fit its content"):
            load(path)
