from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import callbacks.export
from callbacks import WeightAveraging
from callbacks.weight_averaging import averaged_tensors
from datamodules import WiderFaceDataModule
from lightning_modules import CompressionModule
from retinaface.compression.quantization import FakeQuantizedRetinaFace
from retinaface.compression.structure import load_network
from retinaface.errors import InputError
from retinaface.evaluation.wider_ap import WiderFaceAP

ROOT = Path(__file__).parents[2]
AVERAGE = [f"--config={ROOT / 'configs' / 'weight_averaging.yaml'}", "--trainer.callbacks.init_args.decay=0.5"]


def copied(module):
    return {name: value.clone() for name, value in averaged_tensors(module.network).items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def weights_of(checkpoint, names):
    return {name: checkpoint["state_dict"][f"network.{name}"] for name in names}


class Record(L.Callback):
    """Copies the weights after each step, in validation and after it, and when a fit is over."""

    def __init__(self):
        self.steps, self.validated, self.afterwards, self.end = [], [], [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(copied(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(copied(pl_module))

    def on_validation_end(self, trainer, pl_module):
        self.afterwards.append(copied(pl_module))

    def on_fit_end(self, trainer, pl_module):
        self.end = copied(pl_module)


@pytest.fixture(scope="module")
def fitted(tiny_root, tiny_checkpoint, tmp_path_factory):
    """A module after 3 epochs of 2 steps with its teacher, what was recorded, and the trainer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("averaged")
    record = Record()
    module = CompressionModule(str(tiny_checkpoint), str(tiny_checkpoint))
    teacher = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        callbacks=[record, WeightAveraging(0.3), ModelCheckpoint(folder, filename="last")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    data = WiderFaceDataModule(tiny_root, train_size=64, batch_size=4, num_workers=0)
    trainer.fit(module, datamodule=data)
    return SimpleNamespace(module=module, record=record, trainer=trainer, folder=folder, teacher=teacher, data=data)


def test_average_follows_the_weights(fitted):
    record = fitted.record
    average = record.steps[0]
    for number, weights in enumerate(record.steps[1:], start=2):
        kept = min(0.3, (1 + number) / (10 + number))
        average = {name: kept * average[name] + (1 - kept) * value for name, value in weights.items()}
    for name, value in record.end.items():
        assert torch.allclose(value, average[name], rtol=1e-5, atol=1e-6), name
    assert any(name.endswith("running_mean") for name in average)
    assert any(not torch.allclose(value, record.steps[-1][name], rtol=1e-3) for name, value in average.items())


def test_average_is_validated_saved_and_kept_while_training_goes_on_without(fitted):
    record = fitted.record
    assert_same(record.afterwards[0], record.steps[1])
    assert_same(record.afterwards[2], record.steps[5])
    assert_same(record.validated[-1], record.end)
    checkpoint = torch.load(fitted.folder / "last.ckpt", weights_only=True)
    assert_same(weights_of(checkpoint, record.end), record.end)
    assert_same(checkpoint["weights_in_training"], record.steps[-1])
    network, _ = load_network(fitted.folder / "last.ckpt")
    assert_same(averaged_tensors(network), record.end)


def test_the_teacher_is_neither_averaged_nor_saved(fitted):
    checkpoint = torch.load(fitted.folder / "last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in [*checkpoint["state_dict"], *checkpoint["weights_in_training"]])
    assert_same(fitted.module.teacher.state_dict(), fitted.teacher)


def test_another_use_of_the_trainer_leaves_the_average_alone(fitted):
    fitted.trainer.validate(fitted.module, datamodule=fitted.data, verbose=False)
    assert_same(fitted.record.validated[-1], fitted.record.end)
    assert_same(copied(fitted.module), fitted.record.end)


def test_a_checkpoint_from_within_a_validation_is_no_other(fitted, tmp_path):
    """A cluster may end a job at any moment, with a checkpoint."""
    callback = WeightAveraging()
    training = copied(fitted.module)
    callback._away = {name: value + 1 for name, value in training.items()}
    contents = []
    for change in (callback.on_validation_epoch_start, callback.on_validation_epoch_end):
        contents.append({"state_dict": fitted.module.state_dict()})
        callback.on_save_checkpoint(fitted.trainer, fitted.module, contents[-1])
        contents[-1] = [
            {name: value.clone() for name, value in part.items()}
            for part in (weights_of(contents[-1], training), contents[-1]["weights_in_training"])
        ]
        change(fitted.trainer, fitted.module)
    for before, within in zip(*contents, strict=True):
        assert_same(within, before)
    assert_same(copied(fitted.module), training)


def crash_in_second_epoch(callback, trainer, *_):
    if trainer.current_epoch == 1 and trainer.global_step == 3:
        raise RuntimeError("crash")


@pytest.fixture
def exported(monkeypatch):
    """The weights that were exported, per stage, without the file."""
    found = []
    monkeypatch.setattr(
        callbacks.export,
        "export_onnx",
        lambda network, *_, **__: found.append(copied(SimpleNamespace(network=network))),
    )
    return found


@pytest.fixture
def arguments_of(tiny_root, tiny_checkpoint, make_stage_arguments):
    """The arguments of a stage, the last of them an option of its own callback."""
    options = {"prune": "recalibrate=0", "qat": "freeze_at=0.6"}
    start = [f"--model.init_args.{role}={tiny_checkpoint}" for role in ("student", "teacher")]
    return lambda stage: make_stage_arguments(
        stage, tiny_root, *start, f"--trainer.callbacks.init_args.{options[stage]}", "--trainer.max_epochs=2"
    )


@pytest.mark.parametrize("stage", ["prune", pytest.param("qat", marks=pytest.mark.slow)])
def test_stages_end_with_the_average_also_when_resumed(stage, arguments_of, tmp_path, run_stage, exported, monkeypatch):
    arguments = [*arguments_of(stage), *AVERAGE]
    cli = run_stage(arguments, tmp_path / "whole")
    found = {type(each).__name__: each for each in cli.trainer.callbacks}
    assert found["WeightAveraging"].decay == 0.5
    if stage == "prune":  # also for options that come before the file, as those of a recipe do
        assert found["ChannelPruning"].recalibrate == 0
    checkpoint = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    average = weights_of(checkpoint, exported[-1])
    assert all(value.isfinite().all() for value in average.values())
    assert_same(exported[-1], average)
    assert_same(copied(cli.model), average)
    assert [name for name, value in average.items() if not torch.equal(value, checkpoint["weights_in_training"][name])]
    network, _ = load_network(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert isinstance(network, FakeQuantizedRetinaFace) == (stage == "qat")
    images = torch.rand(1, 3, 64, 96) * 255 - 110
    with torch.no_grad():
        for expected, actual in zip(cli.model.network.eval()(images), network(images), strict=True):
            assert torch.equal(expected, actual)

    with monkeypatch.context() as patch:
        patch.setattr(WeightAveraging, "on_train_batch_start", crash_in_second_epoch, raising=False)
        with pytest.raises(RuntimeError, match="crash"):
            run_stage(arguments, tmp_path / "killed")
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 0
    run_stage(arguments, tmp_path / "killed", f"--ckpt_path={last}")
    resumed = torch.load(last, weights_only=True)
    assert_same(resumed["state_dict"], checkpoint["state_dict"])
    assert_same(resumed["weights_in_training"], checkpoint["weights_in_training"])
    # Killed between the last checkpoint and the export: nothing is left to train.
    run_stage(arguments, tmp_path / "killed", f"--ckpt_path={last}")
    assert len(exported) == 3
    assert_same(exported[-1], average)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "qat"])
def test_two_processes_end_with_the_same_average(stage, arguments_of, tmp_path, check_two_processes):
    check_two_processes([*arguments_of(stage), *AVERAGE], tmp_path)


def test_early_stopping_ends_a_stage_in_good_order(
    tiny_root, tiny_checkpoint, make_stage_arguments, tmp_path, run_stage, exported, monkeypatch
):
    figures = iter([0.5, 0.4, 0.3])
    monkeypatch.setattr(WiderFaceAP, "compute", lambda self: {"all": torch.tensor(next(figures))})
    early = [f"--config={ROOT / 'configs' / 'early_stopping.yaml'}", "--trainer.callbacks.init_args.patience=1"]
    arguments = make_stage_arguments("teacher", tiny_root, f"--model.init_args.weights={tiny_checkpoint}")
    cli = run_stage(arguments, tmp_path, *early)
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, EarlyStopping))
    assert (callback.monitor, callback.mode, callback.stopped_epoch) == ("val/ap_all", "max", 1)
    assert cli.trainer.global_step == 4  # of 6
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1
    (weights,) = exported
    assert_same(weights, weights_of(checkpoint, weights))


def test_bad_settings_are_named(tmp_path):
    for decay in (-0.1, 1.0):
        with pytest.raises(InputError, match=f"decay is {decay}"):
            WeightAveraging(decay)
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[checkpoint], enable_progress_bar=False)
    with pytest.raises(InputError, match="save_weights_only"):
        WeightAveraging().setup(trainer, CompressionModule(), "fit")
