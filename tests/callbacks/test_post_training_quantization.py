import json

import lightning as L
import onnx
import pytest
import torch

from callbacks import PostTrainingQuantization
from datamodules import WiderFaceDataModule
from lightning_modules import CompressionModule
from retinaface.compression.calibration import CalibrationPictures, CalibrationSettings, calibrate
from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.compression.structure import load_float_network, load_network
from retinaface.data.annotations import load_split
from retinaface.errors import InputError
from retinaface.evaluation.int8_share import convolutions_in_int8


@pytest.fixture(scope="module")
def ptq_run(tiny_root, tiny_checkpoint, tmp_path_factory, run_stage, make_stage_arguments):
    folder = tmp_path_factory.mktemp("ptq")
    arguments = make_stage_arguments("ptq", tiny_root, f"--model.init_args.student={tiny_checkpoint}")
    return run_stage(arguments, folder), folder, arguments


def test_nothing_is_trained_and_the_result_is_calibrated(ptq_run, tiny_root, tiny_checkpoint):
    cli, folder, _ = ptq_run
    assert cli.trainer.global_step == 0  # though the arguments ask for epochs
    expected = prepare_for_training(load_float_network(tiny_checkpoint)[0], QuantizationSettings())
    photos = CalibrationPictures(load_split(tiny_root, "train"), 64)
    calibrate(expected, photos, CalibrationSettings("histogram"))
    saved, structure = load_network(folder / "checkpoints" / "last.ckpt")
    assert structure.quantization is not None
    state = saved.state_dict()
    for name, value in expected.state_dict().items():
        assert name.endswith("_enabled") or torch.equal(state[name], value), name


def test_the_file_runs_in_int8(ptq_run):
    file = ptq_run[1] / "model.onnx"
    share = convolutions_in_int8(file)
    assert (share.int8, share.total) == (56, 56)
    model = onnx.load(file)
    assert sum(initializer.data_type == onnx.TensorProto.INT8 for initializer in model.graph.initializer) > 20
    (entry,) = model.metadata_props
    assert json.loads(entry.value)["precision"] == "int8"


def test_goes_on_from_its_checkpoint_without_looking_again(ptq_run, tmp_path, run_stage, monkeypatch, without_export):
    _, folder, arguments = ptq_run
    monkeypatch.setattr("callbacks.post_training_quantization.calibrate", None)
    last = folder / "checkpoints" / "last.ckpt"
    run_stage(arguments, tmp_path, f"--ckpt_path={last}")
    again = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    before = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], value) for name, value in before.items())


def trainer(datamodule=None):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = datamodule
    return trainer


def test_refusals(tiny_root, tiny_checkpoint, quantized_run):
    module = CompressionModule(str(tiny_checkpoint))
    with pytest.raises(InputError, match="give a data module"):
        PostTrainingQuantization().setup(trainer(), module, "fit")
    with pytest.raises(InputError, match="quantized already"):
        PostTrainingQuantization().setup(trainer(), quantized_run.cli.model, "fit")
    with pytest.raises(InputError, match="photos is 0"):
        PostTrainingQuantization(photos=0)
    callback, data = PostTrainingQuantization(keep_float=["nowhere"]), WiderFaceDataModule(tiny_root)
    with pytest.raises(InputError, match="nowhere"):
        callback.setup(trainer(data), module, "fit")


def test_an_unreadable_photo_is_named(tmp_path, tiny_root, tiny_checkpoint):
    data = WiderFaceDataModule(tiny_root)
    data.setup("fit")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(data.train_samples[0].path.read_bytes()[:100])
    object.__setattr__(data.train_samples[0], "path", broken)
    module = CompressionModule(str(tiny_checkpoint))
    with pytest.raises(InputError, match=r"broken\.jpg: truncated"):
        PostTrainingQuantization().setup(trainer(data), module, "fit")


def test_a_machine_that_saturates_is_told_the_setting(tiny_checkpoint, tiny_root, monkeypatch):
    monkeypatch.setattr("callbacks.quantization.saturates_int8", lambda: True)
    data = WiderFaceDataModule(tiny_root)
    data.setup("fit")
    callback = PostTrainingQuantization(photos=1, observer="minmax", correct_biases=False)
    with pytest.warns(UserWarning, match=r"no INT8 dot products.*weight_bits to 7"):
        callback.setup(trainer(data), CompressionModule(str(tiny_checkpoint)), "fit")
