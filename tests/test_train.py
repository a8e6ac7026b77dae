import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.loggers import CSVLogger

import train
from callbacks import ChannelPruning, QuantizationAwareTraining, WandbLogger
from lightning_modules import AtomicCheckpointIO, CompressionModule, RetinaFaceModule
from retinaface.evaluation.wider_ap import WiderFaceAP
from retinaface.model.postprocess import Detections

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


def arguments(root, *configs, more=(), command="fit"):
    return [
        command,
        *(f"--config={CONFIGS / name}" for name in ("default.yaml", *configs)),
        f"--data.init_args.root={root}",
        "--data.init_args.train_size=64",
        "--data.init_args.batch_size=4",
        "--data.init_args.num_workers=0",
        *more,
    ]


def from_checkpoint(path):
    return (f"--model.init_args.student={path}", f"--model.init_args.teacher={path}")


DEVELOPMENT = "--trainer.fast_dev_run=1"
TEACHER = ("data/wider_face.yaml", "model/mobilenet025.yaml", "stage/teacher.yaml")


def test_teacher_stage(tiny_root):
    cli = train.main(arguments(tiny_root, *TEACHER, more=[DEVELOPMENT, "--model.init_args.network.channels=16"]))
    assert type(cli.model) is RetinaFaceModule
    assert cli.model.structure.network.backbone == "mobilenet0.25"
    assert cli.trainer.global_step == 1
    assert not [path for path in Path.cwd().rglob("*") if path.suffix in (".onnx", ".jpg")]  # a trial leaves nothing


def test_synthetic_photos_are_rendered(tmp_path):
    root = tmp_path / "rendered"
    sizes = [f"--data.init_args.{name}={value}" for name, value in (("train_photos", 4), ("val_photos", 2))]
    more = [DEVELOPMENT, "--model.init_args.network.channels=16", "--data.init_args.photo_size=96", *sizes]
    cli = train.main(arguments(root, "data/synthetic_faces.yaml", *TEACHER[1:], more=more))
    assert cli.trainer.global_step == 1
    assert len(list(root.rglob("*.jpg"))) == 6


@pytest.mark.parametrize(("stage", "callback"), [("prune", ChannelPruning), ("qat", QuantizationAwareTraining)])
def test_compression_stages(stage, callback, tiny_root, tiny_checkpoint):
    more = [DEVELOPMENT, *from_checkpoint(tiny_checkpoint)]
    cli = train.main(arguments(tiny_root, "data/wider_face.yaml", f"stage/{stage}.yaml", more=more))
    assert type(cli.model) is CompressionModule
    assert any(isinstance(each, callback) for each in cli.trainer.callbacks)
    assert bool(cli.model.structure.plans) == (stage == "prune")
    assert (cli.model.structure.quantization is not None) == (stage == "qat")
    assert cli.trainer.global_step == 1


def test_short_options_reach_the_stages_own_callback(tiny_root, tiny_checkpoint):
    more = [DEVELOPMENT, *from_checkpoint(tiny_checkpoint), "--trainer.callbacks.init_args.ratio=0.1"]
    cli = train.main(arguments(tiny_root, "data/wider_face.yaml", "stage/prune.yaml", more=more))
    pruning = next(each for each in cli.trainer.callbacks if isinstance(each, ChannelPruning))
    assert pruning.settings.ratio == 0.1


@pytest.fixture
def no_export(monkeypatch):
    """Takes seconds, and says nothing about what a test looks at."""
    monkeypatch.setattr("callbacks.export.export_onnx", lambda *_, **__: None)


def one_run_in(folder, epochs=1):
    return [
        "--model.init_args.network.channels=16",
        f"--trainer.max_epochs={epochs}",
        f"--trainer.default_root_dir={folder}",
        f"--checkpoint.dirpath={folder / 'checkpoints'}",
    ]


@pytest.mark.parametrize(
    ("options", "place"),
    [(["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=curves"], "curves/lightning_logs/version_0"),
     (["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=."], "lightning_logs/version_0")],
)  # fmt: skip
def test_loggers_write_to_the_runs_folder(options, place, tiny_root, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    monkeypatch.setattr(L.Trainer, "_fit_impl", lambda *_, **__: None)
    cli = train.main(arguments(tiny_root, *TEACHER, more=[*one_run_in(tmp_path / "run"), *options]))
    assert cli.trainer.log_dir == str(tmp_path / "run" / place)


@pytest.mark.slow
def test_curves_and_pictures_are_in_tensorboard(tiny_root, tmp_path, no_export):
    """Where it is installed: ``pip install tensorboard``."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=.", "--trainer.log_every_n_steps=1"]
    cli = train.main(arguments(tiny_root, *TEACHER, more=[*one_run_in(tmp_path), *options]))
    events = reader.EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    assert {"train/loss", "val/ap_all", "train/images_per_second"} <= set(events.Tags()["scalars"])
    assert {"train/batch", "val/detections"} <= set(events.Tags()["images"])


def test_wandb_is_added_to_the_csv_files(tiny_root, tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "_fit_impl", lambda *_, **__: None)
    more = [*one_run_in(tmp_path / "run"), "--trainer.logger.init_args.project=faces"]
    cli = train.main(arguments(tiny_root, *TEACHER, "wandb.yaml", more=more))
    csv, dashboard = cli.trainer.loggers
    assert isinstance(csv, CSVLogger)
    assert csv.log_dir == str(tmp_path / "run" / "lightning_logs" / "version_0")
    assert isinstance(dashboard, WandbLogger)
    assert dashboard.name == "faces"


@pytest.mark.parametrize(("more", "values"), [([], [1.0, 0.5, 0.25]), (["--trainer.check_val_every_n_epoch=2"], [1.0])])
def test_last_checkpoint_is_the_newest_even_as_accuracy_falls(
    more, values, tiny_root, tmp_path, monkeypatch, no_export
):
    left = iter(values)
    monkeypatch.setattr(WiderFaceAP, "compute", lambda self: {"all": torch.tensor(next(left))})
    cli = train.main(arguments(tiny_root, *TEACHER, more=[*one_run_in(tmp_path, epochs=3), *more]))
    assert float(cli.trainer.callback_metrics["val/ap_all"]) == values[-1]
    assert next(left, None) is None
    (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert file.name == "last.ckpt"
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    content = torch.load(file, weights_only=True)
    assert content["epoch"] == 2
    assert content["global_step"] == cli.trainer.global_step == 6
    trained = cli.model.network.state_dict()
    assert all(torch.equal(trained[name.removeprefix("network.")], v) for name, v in content["state_dict"].items())


def test_the_best_epoch_can_be_kept_instead(tiny_root, tmp_path, monkeypatch, no_export):
    """By the photos that it is then measured on; so it has to be asked for."""
    figures = iter([0.3, 0.9, 0.5])
    monkeypatch.setattr(WiderFaceAP, "compute", lambda self: {"all": torch.tensor(next(figures))})
    best = ["--checkpoint.monitor=val/ap_all", "--checkpoint.mode=max"]
    cli = train.main(arguments(tiny_root, *TEACHER, more=[*one_run_in(tmp_path, epochs=3), *best]))
    assert float(cli.trainer.checkpoint_callback.best_model_score) == pytest.approx(0.9)
    (kept,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert torch.load(kept, weights_only=True)["epoch"] == 1


def test_predict_finds_faces_on_the_validation_photos(tiny_root, tiny_checkpoint):
    more = ["--model=lightning_modules.RetinaFaceModule", f"--model.init_args.weights={tiny_checkpoint}"]
    cli = train.main(arguments(tiny_root, "data/wider_face.yaml", command="predict", more=more))
    found = cli.trainer.predict_loop.predictions
    assert len(found) == 5
    assert all(isinstance(faces, Detections) for batch in found for faces in batch)


def test_compression_without_a_student_is_one_line(tiny_root, capsys, monkeypatch):
    monkeypatch.setattr("callbacks.ChannelPruning.setup", lambda *_: pytest.fail("began to prune"))
    error = one_line_error(arguments(tiny_root, "data/wider_face.yaml", "stage/prune.yaml"), capsys)
    assert "student: none given" in error


def test_noise_is_off_and_a_checkpoint_validates(tiny_root, tiny_checkpoint, tmp_path, capfd, recwarn):
    """One real epoch with a teacher, then `validate` and `test` from its checkpoint."""
    more = [
        *from_checkpoint(tiny_checkpoint),
        "--trainer.max_epochs=1",
        f"--trainer.default_root_dir={tmp_path}",
        f"--checkpoint.dirpath={tmp_path / 'checkpoints'}",
        '--trainer.callbacks=[{"class_path":"lightning.pytorch.callbacks.LearningRateMonitor"}]',
    ]
    fitted = train.main(arguments(tiny_root, "data/wider_face.yaml", "stage/prune.yaml", more=more))
    shown = capfd.readouterr().err + "".join(str(warning.message) for warning in recwarn)
    for noise in ("tensorboardX", "Tip:", "eval mode", "logging interval", "LeafSpec"):
        assert noise not in shown
    ap = fitted.trainer.callback_metrics["val/ap_all"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", ".lock"}
    for command in ("validate", "test"):
        last = f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"
        configs = ("data/wider_face.yaml",)
        again = train.main(
            arguments(tiny_root, *configs, command=command, more=["--model=lightning_modules.CompressionModule", last])
        )
        assert torch.equal(again.trainer.callback_metrics["val/ap_all"], ap)


def one_line_error(args, capsys):
    """The message that a wrong call ends with."""
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    assert stop.value.code == 2
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert output.err.rstrip().endswith(lines[0])
    assert "Traceback" not in output.err + output.out
    return lines[0]


SMALL = ("--model.init_args.network.channels=16",)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.init_args.root=/nowhere", r"/nowhere: no such folder; give the folder"),
        ("--data.init_args.batch_size=0", r"batch_size: expected at least 1, found 0"),
        ("--data.init_args.batch_size=99", r"do not fill a batch of 99; set batch_size to at most 8"),
        ("--model.init_args.weights=/nowhere.pth", r"/nowhere\.pth: no such file; expected a checkpoint"),
        ("--model.init_args.network.strides=[16,32]", r"network: 3 lists of anchor sizes for 2 strides; expected one"),
        ("--model.init_args.optimizer.learning_rate=0", r"optimizer: learning_rate is 0"),
        ("--ckpt_path=/nowhere.ckpt", r"/nowhere\.ckpt: no such file; expected a checkpoint"),
        (f"--ckpt_path={ROOT / 'pyproject.toml'}", r"pyproject\.toml: not a checkpoint that can be read"),
    ],
)
def test_bad_option_is_one_line(option, message, tiny_root, capsys):
    error = one_line_error(arguments(tiny_root, *TEACHER, more=[DEVELOPMENT, *SMALL, option]), capsys)
    assert re.search(message, error), error


def test_checkpoint_of_another_network_is_one_line(tiny_root, tiny_checkpoint, capsys):
    configs = ("data/wider_face.yaml", "model/resnet50.yaml", "stage/teacher.yaml")
    more = [DEVELOPMENT, f"--model.init_args.weights={tiny_checkpoint}"]
    error = one_line_error(arguments(tiny_root, *configs, more=more), capsys)
    assert str(tiny_checkpoint) in error
    assert "resnet50" in error


def test_weights_cannot_be_resumed_from(tiny_root, tiny_checkpoint, capsys):
    more = [DEVELOPMENT, *SMALL, f"--ckpt_path={tiny_checkpoint}"]
    error = one_line_error(arguments(tiny_root, *TEACHER, more=more), capsys)
    assert f"{tiny_checkpoint}: not a checkpoint that train.py saved" in error


@pytest.fixture
def task_of_a_job(monkeypatch):
    """This process is the only task of a step, without the configuration for a cluster."""
    monkeypatch.setenv("SLURM_JOB_NAME", "name")
    for name, value in (("JOB_ID", "7"), ("NTASKS", "1"), ("NNODES", "1"), ("PROCID", "0"), ("LOCALID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_lightnings_own_checkpoints_for_clusters_are_left_alone(
    command, task_of_a_job, tiny_root, tiny_checkpoint, tmp_path
):
    """They lie in a folder that another job may use."""
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("another job's")
    weights = f"--model.init_args.weights={tiny_checkpoint}"
    more = [DEVELOPMENT, *SMALL, weights, f"--trainer.default_root_dir={tmp_path}"]
    cli = train.main(arguments(tiny_root, *TEACHER, more=more, command=command))
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert environment.auto_requeue is False
    assert cli.trainer.ckpt_path is None


def test_lightnings_own_checkpoint_for_clusters_cannot_be_asked_for(tiny_root, capsys):
    error = one_line_error(arguments(tiny_root, *TEACHER, more=[DEVELOPMENT, *SMALL, "--ckpt_path=hpc"]), capsys)
    assert "hpc: no such file; expected a checkpoint" in error


@pytest.mark.parametrize(
    ("environment", "together"),
    [(SLURMEnvironment, True), (TorchElasticEnvironment, True), (LightningEnvironment, False)],
)
def test_processes_that_start_together_take_what_the_first_one_takes(environment, together, monkeypatch):
    trainer = MagicMock(world_size=2)
    trainer._accelerator_connector.cluster_environment = MagicMock(spec=environment)
    monkeypatch.setattr(train, "decided_by_first_process", lambda trainer, choose: Path("first.ckpt"))
    assert train._choose_together(trainer, lambda: Path("own.ckpt")) == Path("first.ckpt" if together else "own.ckpt")
    assert trainer.strategy.setup_environment.called is together


def test_empty_annotations_are_one_line(tiny_root, tmp_path, capsys):
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    for file in (root / "wider_face_split").iterdir():
        file.write_text("")
    error = one_line_error(arguments(root, *TEACHER, more=[DEVELOPMENT, *SMALL]), capsys)
    assert str(root / "wider_face_split") in error
    assert "empty" in error


def truncate_a_photo(folder):
    photo = sorted(folder.rglob("*.jpg"))[0]
    photo.write_bytes(photo.read_bytes()[:600])
    return photo


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_photo_to_validate_with_is_one_line(workers, tiny_root, tmp_path, capsys):
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    photo = truncate_a_photo(root / "WIDER_val")
    more = [DEVELOPMENT, *SMALL, f"--data.init_args.num_workers={workers}"]
    error = one_line_error(arguments(root, *TEACHER, more=more), capsys)
    assert str(photo) in error


def test_truncated_photo_to_train_on_is_skipped_with_a_warning(tiny_root, tmp_path):
    root = Path(shutil.copytree(tiny_root, tmp_path / "root"))
    photo = truncate_a_photo(root / "WIDER_train")
    more = ["--trainer.fast_dev_run=2", *SMALL]
    with pytest.warns(UserWarning, match=rf"{photo}: unreadable, another photo takes its place"):
        cli = train.main(arguments(root, *TEACHER, more=more))
    assert cli.trainer.global_step == 2
    assert cli.datamodule.skipped_files == {str(photo)}


def test_a_signal_waits_while_everything_is_imported(tmp_path):
    """A cluster may say that the time is over before there is anyone to hear it."""
    (tmp_path / "lightning.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGUSR2)\nraise SystemExit(str(signal.sigpending()))"
    )
    command = [sys.executable, str(ROOT / "train.py"), "fit"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "SIGUSR2" in result.stderr, result.returncode


@pytest.mark.parametrize(("given", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "1"}, "1")])
def test_threads_wait_as_long_as_asked(given, expected, tmp_path):
    """It has to be said before the first import that loads torch: a later setting changes nothing."""
    (tmp_path / "lightning.py").write_text(
        "import os, sys\nassert 'torch' not in sys.modules\nraise SystemExit(os.environ['GOMP_SPINCOUNT'])"
    )
    others = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment = {**others, **given, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "train.py"), "fit"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.stderr.strip() == expected


def test_the_signal_comes_when_the_callbacks_are_there(tiny_root, monkeypatch):
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append("too early"))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # other tests may have left threads without the mask
        monkeypatch.setattr("callbacks.NanGuard.__init__", lambda self: listen(seen))
        monkeypatch.setattr(train.RetinaFaceCLI, "before_fit", lambda self: sys.exit(len(seen)))
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(tiny_root, *TEACHER, more=["--model.init_args.network.channels=16"]))
        assert stop.value.code == 1
        assert seen == ["heard"]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR2, before)


def listen(seen):
    signal.signal(signal.SIGUSR2, lambda *_: seen.append("heard"))


def test_command_line_prints_one_line(tiny_root):
    command = [sys.executable, str(ROOT / "train.py")]
    args = arguments("/nowhere", *TEACHER, more=[DEVELOPMENT, *SMALL])
    result = subprocess.run([*command, *args], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: /nowhere: no such folder")
    assert "Traceback" not in result.stderr


def test_faults_of_the_program_keep_their_traceback(tiny_root, monkeypatch):
    monkeypatch.setattr(RetinaFaceModule, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(arguments(tiny_root, *TEACHER, more=[DEVELOPMENT, *SMALL]))
