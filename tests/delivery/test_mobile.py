import importlib.util
import json
from copy import deepcopy

import cv2
import numpy as np
import pytest
import torch

from retinaface.__main__ import main
from retinaface.compression.quantization import convert
from retinaface.delivery import mobile
from retinaface.delivery.export import METADATA_KEY
from retinaface.delivery.mobile import MobileForm, export_mobile
from retinaface.delivery.onnx_forms import OnnxSettings
from retinaface.errors import InputError

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None,
    reason="ExecuTorch is not installed; run `pip install executorch==1.5.1` (34 packages) in the tests' environment",
)


def test_without_executorch_the_remedy_is_named(checkpoint_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(checkpoint_files["float"]), "--out", str(tmp_path / "x.pte")])
    assert stop.value.code == 2
    assert "x.pte: ExecuTorch is not installed; run `pip install executorch`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_suppression_is_refused(tiny_network, tmp_path):
    with pytest.raises(InputError, match=r"x.pte: ExecuTorch has no suppression of boxes; choose the form raw or"):
        export_mobile(tiny_network, tmp_path / "x.pte", OnnxSettings("end_to_end"))


def test_int8_activations_are_the_same_numbers_as_uint8(compressed):
    graph = convert(compressed.int8)
    images = torch.rand(1, 3, 64, 96) * 255 - 110
    before = graph(images)
    assert "torch.uint8" in graph.code
    after = mobile._with_int8_activations(graph)(images)
    assert "torch.uint8" not in graph.code
    assert all(torch.equal(mine, other) for mine, other in zip(after, before, strict=True))


# With ExecuTorch


def run(path, images):
    method = importlib.import_module("executorch.runtime").Runtime.get().load_program(path).load_method
    return method("forward").execute([images]), json.loads(method(METADATA_KEY).execute([])[0])


def left_out(program):
    """The operations that XNNPACK does not run, each as often as it is called."""
    serialized = importlib.import_module("executorch.exir._serialize._program")
    plans = serialized.deserialize_pte_binary(program).program.execution_plan
    plan = next(plan for plan in plans if plan.name == "forward")
    called = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    return [plan.operators[each.op_index].name for each in called if hasattr(each, "op_index")]


@pytest.mark.slow
@needs_executorch
def test_float_decoded_from_uint8(tiny_network, tmp_path):
    path = tmp_path / "new" / "x.pte"
    settings = OnnxSettings("decoded", "uint8", (64, 96), 2)
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    export_mobile(tiny_network, path, settings, [photo])
    pictures = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    found, facts = run(path, pictures)
    with torch.no_grad():
        wanted = MobileForm(tiny_network, tiny_network.config, settings)(pictures)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert (facts["form"], facts["size"], facts["batch"], facts["input"]["type"]) == ("decoded", [64, 96], 2, "uint8")
    assert [each.name for each in path.parent.iterdir()] == ["x.pte"]


@pytest.mark.slow
@needs_executorch
def test_int8_and_no_file_unless_it_is_right(compressed, tmp_path, monkeypatch):
    path = tmp_path / "x.pte"
    settings = OnnxSettings(size=(64, 96))
    contents = []
    to_program = mobile._to_program
    monkeypatch.setattr(mobile, "_to_program", lambda *given: contents.append(to_program(*given)) or contents[-1])
    export_mobile(compressed.int8, path, settings)
    assert path.read_bytes() == contents[0]
    assert left_out(contents[0]) == ["aten::upsample_nearest2d"] * 2
    # Heads, pyramid and first convolution are in float; all in float, the weights alone would take more.
    assert len(contents[0]) < 0.7 * 4 * sum(weight.numel() for weight in compressed.pruned.parameters())
    images = torch.randint(256, (1, 3, 64, 96)).float() - 110
    found, facts = run(path, images)
    assert (facts["precision"], facts["batch"], facts["size"]) == ("int8", 1, [64, 96])
    wanted = convert(compressed.int8)(images)
    with torch.no_grad(), compressed.int8.without_rounding():
        exact = compressed.int8(images)
    for ours, theirs, unrounded in zip(found, wanted, exact, strict=True):
        assert (ours - theirs).abs().mean() < 0.5 * (unrounded - theirs).abs().mean()
    # What was exported from another network.
    other = deepcopy(compressed.int8)
    monkeypatch.setattr(mobile, "_to_program", lambda *_: contents[0])
    for name, bias in other.graph.named_parameters():
        if "class_heads" in name and name.endswith("bias"):
            bias.data += 5
    with pytest.raises(RuntimeError, match=r"x.pte: class_logits of ExecuTorch differs from torch"):
        export_mobile(other, path, settings)
    assert path.read_bytes() == contents[0]
    assert [each.name for each in tmp_path.iterdir()] == ["x.pte"]
