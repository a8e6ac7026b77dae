import json

import onnx
import onnxruntime as ort
import pytest
import torch

from callbacks import ExportOnnx
from retinaface.compression.structure import load_network
from retinaface.delivery.onnx_forms import OnnxSettings


def outputs(file, images):
    return ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})


def test_float_stage_leaves_a_float_file_in_its_folder(pruned_run):
    file = pruned_run.folder / "model.onnx"
    assert all(initializer.data_type != onnx.TensorProto.INT8 for initializer in onnx.load(file).graph.initializer)
    network, _ = load_network(pruned_run.checkpoint)
    images = torch.rand(2, 3, 96, 64) * 255 - 110
    with torch.no_grad():
        expected = network(images)
    for want, got in zip(expected, outputs(file, images), strict=True):
        assert torch.allclose(want, torch.from_numpy(got), atol=1e-3)


def test_file_says_where_it_comes_from(pruned_run, tiny_root):
    (entry,) = onnx.load(pruned_run.folder / "model.onnx").metadata_props
    facts = json.loads(entry.value)
    assert facts["trained_on"] == tiny_root.name
    measured = float(pruned_run.cli.trainer.callback_metrics["val/ap_all"])
    assert facts["average_precision"]["all"] == pytest.approx(measured, abs=1e-4)


def test_a_stage_interrupted_before_its_export_still_says_what_it_reached(pruned_run, monkeypatch):
    """When it goes on there is nothing left to validate."""
    calls = []
    monkeypatch.setattr("callbacks.export.export_onnx", lambda *_, **more: calls.append(more["average_precision"]))
    first = ExportOnnx()
    first.on_validation_end(pruned_run.cli.trainer, pruned_run.cli.model)
    first.on_fit_end(pruned_run.cli.trainer, pruned_run.cli.model)
    checkpoint = torch.load(pruned_run.checkpoint, weights_only=True)
    monkeypatch.setattr(type(pruned_run.cli.trainer), "callback_metrics", {})
    callback = ExportOnnx()
    callback.on_load_checkpoint(pruned_run.cli.trainer, pruned_run.cli.model, checkpoint)
    callback.on_fit_end(pruned_run.cli.trainer, pruned_run.cli.model)
    assert calls[0]["all"] is not None
    assert calls[1] == calls[0]
    assert "easy" not in calls[0]  # no face there is easy, and NaN is no JSON


def test_what_was_measured_before_the_last_steps_is_not_said(pruned_run, monkeypatch):
    calls = []
    monkeypatch.setattr("callbacks.export.export_onnx", lambda *_, **more: calls.append(more["average_precision"]))
    trainer, module = pruned_run.cli.trainer, pruned_run.cli.model
    callback = ExportOnnx()
    callback.on_validation_end(trainer, module)
    callback.on_train_batch_start(trainer, module, None, 0)
    checkpoint: dict = {}
    callback.on_save_checkpoint(trainer, module, checkpoint)
    callback.on_fit_end(trainer, module)
    assert calls == [None]
    assert checkpoint == {"average_precision": {}, "trained_on": trainer.datamodule.root.name}


@pytest.mark.parametrize("chosen", [True, False])
def test_path_and_first_process(chosen, pruned_run, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("callbacks.export.export_onnx", lambda network, path, *_, **__: written.append(path))
    trainer = pruned_run.cli.trainer
    path = tmp_path / "elsewhere.onnx" if chosen else pruned_run.folder / "model.onnx"
    callback = ExportOnnx(str(path) if chosen else None)
    callback.on_fit_end(trainer, pruned_run.cli.model)
    assert written == [path]
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    callback.on_fit_end(trainer, pruned_run.cli.model)
    assert written == [path]


def test_settings_and_photos_are_passed_on(pruned_run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "callbacks.export.export_onnx", lambda network, path, *given, **more: calls.append((given, more))
    )
    callback = ExportOnnx(None, "end_to_end", "uint8", (480, 640), 1, 0.3, 0.5, 8)
    callback.on_fit_end(pruned_run.cli.trainer, pruned_run.cli.model)
    ((settings,), more) = calls[0]
    assert settings == OnnxSettings("end_to_end", "uint8", (480, 640), 1, 0.3, 0.5, 8)
    photos = [sample.path for sample in pruned_run.cli.datamodule.val_samples]
    assert more["photos"] == [photos[0], photos[2]]
    monkeypatch.setattr(pruned_run.cli.trainer, "datamodule", None)
    monkeypatch.setattr(type(pruned_run.cli.trainer), "callback_metrics", {})
    callback.on_fit_end(pruned_run.cli.trainer, pruned_run.cli.model)
    assert calls[1][1] == {"photos": [], "trained_on": None, "average_precision": None}
