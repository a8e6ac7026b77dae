import os
import signal
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn
from torch.utils.data import DataLoader

from callbacks import QuantizationAwareTraining, Requeue
from lightning_modules import AtomicCheckpointIO
from lightning_modules.checkpoint_io import newest_checkpoint
from retinaface.compression.quantization import FakeQuantizedRetinaFace
from retinaface.errors import InputError
from retinaface.slurm import SAVED

ROOT = Path(__file__).parents[2]
OVERLAY = f"--config={ROOT / 'configs' / 'slurm' / 'slurm.yaml'}"
EPOCHS, STEPS = 3, 2
TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
}


@pytest.fixture(autouse=True)
def _signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def requeued(monkeypatch):
    """The jobs that the cluster was asked to start again; this process is the only task of job 77."""
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_RESTART_COUNT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr("retinaface.slurm.requeue_job", lambda: calls.append(os.environ["SLURM_JOB_ID"]) or True)
    for place in ("callbacks.requeue", "retinaface.slurm"):
        monkeypatch.setattr(f"{place}.is_preempted", lambda: False)
    return calls


class Loader(DataLoader):
    """Goes on within an epoch, as the project's own."""

    trainer = None

    def __iter__(self):
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        yield from islice(super().__iter__(), done, None)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Module(L.LightningModule):
    """Notes what the validations measured, in ``figures``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.figures = []

    def training_step(self, batch):
        return self.network(batch).square().mean()

    def on_validation_epoch_start(self):
        self.seen = []

    def validation_step(self, batch):
        self.seen.append(float(self.network(batch).sum()))

    def on_validation_epoch_end(self):
        assert len(self.seen) == 3
        self.figures.append(sum(self.seen))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.1)

    def train_dataloader(self):
        loader = Loader(torch.arange(32.0).view(8, 4).sin(), batch_size=4)
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self):
        return DataLoader(torch.arange(12.0).view(3, 4).cos(), batch_size=1)


class Ask(L.Callback):
    """Sends this process a signal in a hook, once, after a number of steps."""

    def __init__(self, number, hook, step, batch=None):
        self.sent = False

        def send(trainer, module, *arguments, **_):
            if trainer.global_step == step and not self.sent and (batch is None or arguments[-1] == batch):
                self.sent = True
                os.kill(os.getpid(), number)

        setattr(self, hook, send)


class Average(L.Callback):
    """Changes its state after every step, as averaged weights do, and whatever comes behind Requeue would miss."""

    def __init__(self):
        self.total = 0.0

    def on_train_batch_end(self, trainer, module, *_):
        self.total += float(module.network[0].weight.sum())

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def fit(folder, *more, ends=None, epochs=EPOCHS):
    """Trains, from the newest checkpoint on; with ``Ask`` among the callbacks until that ends it."""
    ends = any(isinstance(callback, Ask) for callback in more) if ends is None else ends
    module, average = Module(), Average()
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(
        folder, "last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False
    )
    plugins = [AtomicCheckpointIO(), SLURMEnvironment(auto_requeue=False)]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, plugins=plugins,
        callbacks=[average, *more, Requeue(), checkpoint],
    )  # fmt: skip
    with pytest.raises(SystemExit, match=str(SAVED)) if ends else nullcontext():
        trainer.fit(module, ckpt_path=newest_checkpoint(folder))
    return module, average, trainer


@pytest.fixture(autouse=True)
def _any_checkpoint_will_do(monkeypatch):
    monkeypatch.setattr("lightning_modules.checkpoint_io.read_resumable", torch.load)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("number", "when", "steps"),
    [
        pytest.param(signal.SIGUSR2, ("on_train_batch_start", 0), 1, id="first step"),
        pytest.param(signal.SIGTERM, ("on_before_backward", 2), 3, id="pre-empted within a step"),
        pytest.param(signal.SIGUSR2, ("on_train_batch_start", 3), 4, id="last step of an epoch"),
        pytest.param(signal.SIGUSR2, ("on_validation_batch_start", 4, 1), 4, id="validation"),
        pytest.param(signal.SIGUSR2, ("on_validation_batch_start", 6, 2), 6, id="end of the last validation"),
        pytest.param(signal.SIGUSR2, ("on_validation_epoch_end", 4), 5, id="behind a validation"),
        pytest.param(signal.SIGUSR2, ("on_fit_start", 0), 1, id="before the training"),
    ],
)
def test_goes_on_after_the_step(number, when, steps, tmp_path, requeued):
    whole, whole_average, _ = fit(tmp_path / "whole")
    cut, _, trainer = fit(tmp_path / "cut", Ask(number, *when))
    assert trainer.global_step == steps
    saved = torch.load(tmp_path / "cut" / "requeued.ckpt")
    assert saved["global_step"] == steps
    assert requeued == (["77"] if number == signal.SIGUSR2 else [])
    resumed, average, trainer = fit(tmp_path / "cut")
    assert trainer.global_step == EPOCHS * STEPS
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert cut.figures + resumed.figures == whole.figures
    assert average.total == whole_average.total
    last = torch.load(tmp_path / "cut" / "last.ckpt")
    assert (last["epoch"], last["global_step"]) == (EPOCHS - 1, EPOCHS * STEPS)
    assert not list(tmp_path.rglob("requeued.ckpt*"))


@pytest.mark.filterwarnings("ignore")
def test_a_job_that_is_preempted_with_grace_is_queued_again(tmp_path, requeued, monkeypatch):
    monkeypatch.setattr("callbacks.requeue.is_preempted", lambda: True)
    fit(tmp_path, Ask(signal.SIGTERM, "on_train_batch_start", 0))
    assert requeued == ["77"]


@pytest.mark.filterwarnings("ignore")
def test_loggers_have_ended_when_the_cluster_is_asked(tmp_path, requeued):
    class LastWords(DummyLogger):
        def finalize(self, status):
            requeued.append(status)

    class Log(L.Callback):
        def on_fit_start(self, trainer, module):
            trainer.loggers = [LastWords()]

    fit(tmp_path, Ask(signal.SIGUSR2, "on_train_batch_start", 0), Log())
    assert requeued[:2] == ["requeued", "77"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_fit_end"])
def test_after_the_training_the_cluster_is_asked_at_once(hook, tmp_path, requeued):
    fit(tmp_path, Ask(signal.SIGUSR2, hook, EPOCHS * STEPS), ends=False)
    assert requeued == ["77"]
    assert (tmp_path / "last.ckpt").is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
def test_before_the_training_the_cluster_is_asked_at_once(hook, tmp_path, requeued):
    """Other callbacks may search there for longer than the cluster waits."""

    class Note(L.Callback):
        def on_train_start(self, trainer, module):
            assert requeued == ["77"]

    fit(tmp_path, Ask(signal.SIGUSR2, hook, 0), Note())
    assert requeued == ["77"]  # and not again after the first step, if it comes to that


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("start", "starts_again"),
    [
        pytest.param({}, True, id="first start"),
        pytest.param({"SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "0"}, False, id="second start"),
        pytest.param({"SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "1"}, True, id="after another stage"),
    ],
)
@pytest.mark.parametrize("hook", ["setup", "on_fit_end"])
def test_a_stage_that_trains_nothing_is_not_begun_for_ever(
    hook, start, starts_again, tmp_path, requeued, monkeypatch, caplog
):
    for name, value in start.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("INFO"):
        fit(tmp_path, Ask(signal.SIGUSR2, hook, 0), ends=False, epochs=0)
    assert requeued == (["77"] if starts_again else [])
    assert ("the time limit is too short for what must be done in one go" in caplog.text) is not starts_again


@pytest.mark.filterwarnings("ignore")
def test_a_second_start_may_still_reach_a_step(tmp_path, requeued, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")

    class Note(L.Callback):
        def on_train_start(self, trainer, module):
            assert requeued == []

    fit(tmp_path, Ask(signal.SIGUSR2, "on_fit_start", 0), Note())
    assert requeued == ["77"]


@pytest.mark.filterwarnings("ignore")
def test_a_step_is_enough_to_start_again(tmp_path, requeued, monkeypatch):
    for count in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        fit(tmp_path, Ask(signal.SIGUSR2, "on_train_batch_start", count))
    assert requeued == ["77"] * 3


@pytest.mark.filterwarnings("ignore")
def test_a_validation_is_not_begun_for_ever(tmp_path, requeued, monkeypatch, caplog):
    for count in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        with caplog.at_level("INFO"):
            fit(tmp_path, Ask(signal.SIGUSR2, "on_validation_batch_start", 2, 1))
    assert requeued == ["77"]  # the first time, after two steps
    assert "the time limit is too short" in caplog.text


@pytest.fixture
def full_disk(monkeypatch):
    """A disk without room for ``requeued.ckpt``."""
    save = AtomicCheckpointIO.save_checkpoint

    def refuse(self, checkpoint, path, storage_options=None):
        if Path(path).name == "requeued.ckpt":
            raise InputError(f"{path}: cannot be written (No space left on device)")
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", refuse)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize(
    ("count", "step", "starts_again"),
    [
        pytest.param("0", 0, True, id="first start"),
        pytest.param("1", 0, False, id="second start"),
        pytest.param("1", 2, True, id="behind a checkpoint"),
    ],
)
def test_a_full_disk_does_not_end_it(count, step, starts_again, tmp_path, requeued, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    with caplog.at_level("INFO"):
        fit(tmp_path, Ask(signal.SIGUSR2, "on_train_batch_start", step))
    assert requeued == (["77"] if starts_again else [])
    assert "cannot be written (No space left on device); it goes on from the checkpoint before" in caplog.text
    assert "saved" not in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == ({"last.ckpt"} if step else set())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("full_disk")
def test_loggers_on_a_full_disk_do_not_end_it_either(tmp_path, requeued):
    class Full(DummyLogger):
        def finalize(self, status):
            if status == "requeued":
                raise OSError("No space left on device")

    class Log(L.Callback):
        def on_fit_start(self, trainer, module):
            trainer.loggers = [Full()]

    fit(tmp_path, Ask(signal.SIGUSR2, "on_train_batch_start", 0), Log())
    assert requeued == ["77"]


@pytest.mark.filterwarnings("ignore")
def test_what_was_saved_last_comes_first(tmp_path):
    """A node that fails after a requeued job has finished an epoch must not lose it."""
    fit(tmp_path, Ask(signal.SIGUSR2, "on_train_batch_start", 0))
    with pytest.raises(RuntimeError, match="node failed"):
        fit(tmp_path, FailInSecondEpoch())
    assert not (tmp_path / "requeued.ckpt").exists()
    assert torch.load(newest_checkpoint(tmp_path))["global_step"] == 2


class FailInSecondEpoch(L.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise RuntimeError("node failed")


@pytest.mark.filterwarnings("ignore")
def test_nothing_happens_without_a_signal(tmp_path, requeued):
    before = signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)
    fit(tmp_path)
    assert (signal.getsignal(signal.SIGUSR2), signal.getsignal(signal.SIGTERM)) == before
    assert requeued == []


def test_ranges_that_stand_still_do_so_within_the_epoch(tmp_path):
    """Where a fit goes on within an epoch, Lightning does not start it again."""
    before, after = (QuantizationAwareTraining(freeze_at=0.75, freeze_statistics_at=0.25) for _ in range(2))
    module = MagicMock(network=MagicMock(spec=FakeQuantizedRetinaFace))
    before.on_train_epoch_start(MagicMock(global_step=4, estimated_stepping_batches=8), module)
    after.load_state_dict(before.state_dict())
    module.network.ranges_frozen = module.network.statistics_frozen = None
    after.on_train_start(MagicMock(global_step=7, estimated_stepping_batches=8), module)
    assert (module.network.ranges_frozen, module.network.statistics_frozen) == (False, True)


def test_a_stage_with_the_overlay(tiny_root, tiny_checkpoint, tmp_path, requeued, make_stage_arguments, run_stage):
    """The stage's short options still reach its own callback, and Lightning leaves the queue to ours."""
    start = [f"--model.init_args.{role}={tiny_checkpoint}" for role in ("student", "teacher")]
    options = ["--trainer.callbacks.init_args.ratio=0.1", "--trainer.fast_dev_run=1"]
    cli = run_stage([*make_stage_arguments("prune", tiny_root, *start), *options], tmp_path, OVERLAY)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert names.index("ChannelPruning") < names.index("Requeue") < names.index("ModelCheckpoint")
    assert cli.trainer.callbacks[names.index("ChannelPruning")].settings.ratio == 0.1
    assert cli.trainer._accelerator_connector.cluster_environment.auto_requeue is False
    assert isinstance(cli.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
