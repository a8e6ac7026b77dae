"""Whole small stages, each run once for all tests that look at it."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train

ROOT = Path(__file__).parents[2]
EPOCHS = 3


def leave_out_export(patch: pytest.MonkeyPatch) -> None:
    """Leaves out the ONNX file at a stage's end, which takes seconds and changes nothing."""
    patch.setattr("callbacks.export.export_onnx", lambda *_, **__: None)


@pytest.fixture
def without_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """As :func:`leave_out_export`, for one test."""
    leave_out_export(monkeypatch)


@dataclass
class StageRun:
    """A stage that has run: its CLI, its folder and the arguments without those that name the folder."""

    cli: train.RetinaFaceCLI
    folder: Path
    arguments: list[str]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


def stage_arguments(stage: str, root: Path, *more: str) -> list[str]:
    """``train.py fit`` for a stage of ``configs/stage``: 2 steps an epoch."""
    configs = [ROOT / "configs" / name for name in ("default.yaml", "data/wider_face.yaml", f"stage/{stage}.yaml")]
    return [
        "fit",
        *(f"--config={config}" for config in configs),
        f"--data.init_args.root={root}",
        "--data.init_args.train_size=64",
        "--data.init_args.batch_size=4",
        "--data.init_args.num_workers=0",
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.log_every_n_steps=1",
        *more,
    ]


def in_folder(folder: Path) -> list[str]:
    return [f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder / 'checkpoints'}"]


def time_at_once(patch: pytest.MonkeyPatch) -> None:
    """Before pruning 10 ms, after it 5, where the export of both networks alone would take many seconds."""
    before, after = SimpleNamespace(median_ms=10.0, ratio=1.0), SimpleNamespace(median_ms=5.0, ratio=2.0)
    patch.setattr("retinaface.evaluation.speedup.export_onnx", lambda network, path: None)
    patch.setattr("retinaface.evaluation.speedup.benchmark", lambda *args, **options: [before, after])


@pytest.fixture(autouse=True)
def _time_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    time_at_once(monkeypatch)


@pytest.fixture(scope="session")
def make_stage_arguments() -> Callable[..., list[str]]:
    """The function :func:`stage_arguments`."""
    return stage_arguments


@pytest.fixture(scope="session")
def run_stage() -> Callable[..., train.RetinaFaceCLI]:
    """Runs ``train.py`` in this process."""

    def run(arguments: list[str], folder: Path, *more: str) -> train.RetinaFaceCLI:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py"])
            time_at_once(patch)  # for the runs that fixtures of the session make
            return train.main([*arguments, *in_folder(folder), *more])

    return run


@pytest.fixture(scope="session")
def run_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``train.py`` in a process of its own, with the callbacks of ``stage_process.py``."""

    def run(arguments: list[str], folder: Path, *more: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(__file__).with_name("stage_process.py"))]
        return subprocess.run(
            [*command, *arguments, *in_folder(folder), *more],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def pruned_run(
    tiny_root: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, run_stage: Any
) -> StageRun:
    """The pruning stage."""
    folder = tmp_path_factory.mktemp("pruned")
    start = [f"--model.init_args.{role}={tiny_checkpoint}" for role in ("student", "teacher")]
    # A network that never saw a photo answers with noise once its batch statistics are right, and INT8 rounds noise too
    # coarsely for the check of the exported file.
    arguments = stage_arguments("prune", tiny_root, *start, "--trainer.callbacks.init_args.recalibrate=0")
    return StageRun(run_stage(arguments, folder), folder, arguments)


@pytest.fixture(scope="session")
def pruned_again_run(
    tiny_root: Path,
    tiny_checkpoint: Path,
    pruned_run: StageRun,
    tmp_path_factory: pytest.TempPathFactory,
    run_stage: Any,
) -> StageRun:
    """A second pruning stage after the first, with batch statistics estimated anew and a growing regularisation."""
    folder = tmp_path_factory.mktemp("pruned_again")
    arguments = stage_arguments(
        "prune",
        tiny_root,
        f"--model.init_args.student={pruned_run.checkpoint}",
        f"--model.init_args.teacher={tiny_checkpoint}",
        "--trainer.callbacks.init_args.round_to=2",  # 8 would take all that the first stage left, or nothing
        "--trainer.callbacks+=callbacks.SparsityRegularization",
        "--trainer.callbacks.init_args.method=growing",
        "--trainer.callbacks.init_args.strength=0.01",
    )
    with pytest.MonkeyPatch.context() as patch:
        leave_out_export(patch)
        return StageRun(run_stage(arguments, folder), folder, arguments)


@pytest.fixture(scope="session")
def quantized_run(
    tiny_root: Path,
    tiny_checkpoint: Path,
    pruned_run: StageRun,
    tmp_path_factory: pytest.TempPathFactory,
    run_stage: Any,
) -> StageRun:
    """The stage of quantization-aware training, after pruning; ranges stand still in the last epoch only.

    Features are distilled too, through adapters from the pruned width to the teacher's.
    """
    folder = tmp_path_factory.mktemp("quantized")
    start = [f"--model.init_args.student={pruned_run.checkpoint}", f"--model.init_args.teacher={tiny_checkpoint}"]
    arguments = stage_arguments("qat", tiny_root, *start, "--model.init_args.distillation.features=1.0")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_export(patch)
        return StageRun(run_stage(arguments, folder), folder, arguments)


@pytest.fixture(scope="session")
def check_resume(run_stage: Any, run_process: Any) -> Callable[[StageRun, Path], None]:
    """Kills a copy of a run in its second epoch, lets it go on, and compares where both end, to the last bit."""

    def check(uninterrupted: StageRun, folder: Path) -> None:
        crash = run_process(uninterrupted.arguments, folder, "--trainer.callbacks+=stage_process.KillInSecondEpoch")
        assert crash.returncode == -signal.SIGKILL, crash.stderr
        last = folder / "checkpoints" / "last.ckpt"
        assert torch.load(last, weights_only=True)["epoch"] == 0
        with pytest.MonkeyPatch.context() as patch:
            leave_out_export(patch)
            run_stage(uninterrupted.arguments, folder, f"--ckpt_path={last}")
        resumed, expected = (torch.load(path, weights_only=True) for path in (last, uninterrupted.checkpoint))
        assert expected["epoch"] == resumed["epoch"] == EPOCHS - 1  # the newest epoch, whichever had the best AP
        assert resumed["global_step"] == expected["global_step"]
        assert_same_state(resumed["state_dict"], expected["state_dict"])

    return check


@pytest.fixture(scope="session")
def check_two_processes(run_stage: Any, run_process: Any) -> Callable[[list[str], Path], None]:
    """Runs one epoch of a stage in two processes, which must agree."""

    def check(arguments: list[str], folder: Path) -> None:
        result = run_process(
            arguments,
            folder,
            "--data.init_args.batch_size=2",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.devices=2",
            "--trainer.strategy=ddp",
            "--trainer.callbacks+=stage_process.SaveEveryRank",
        )
        assert result.returncode == 0, result.stderr
        first, second = (torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
        assert second["plans"] == first["plans"]
        assert_same_state(second["before"], first["before"])
        assert_same_state(second["after"], first["after"])
        same = {name for name in first["trained"] if torch.equal(first["after"][name], first["before"][name])}
        # These photos are too small for faces of the larger anchors, and biases do not decay.
        assert all(re.search(r"(box|landmark)_heads\.[12]\.bias$", name) for name in same), same
        # 5 photos over 2 processes: one is seen twice, and counts once, as in a single process.
        assert sorted(first["seen"] + second["seen"]) == [0, 0, 1, 2, 3, 4]
        assert first["ap"] == second["ap"]
        alone = run_stage(["validate", *arguments[1:]], folder, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}")
        assert float(alone.trainer.callback_metrics["val/ap_all"]) == first["ap"]

    return check


@pytest.fixture(scope="session")
def check_half_the_batch(run_process: Any) -> Callable[[list[str], Path, Path], None]:
    """Goes on from a checkpoint for one more epoch, in one process and in two with half the batch each.

    Both must learn the same. Batch norms keep their statistics, since those of a batch depend on what is in it.
    """

    def check(arguments: list[str], checkpoint: Path, folder: Path) -> None:
        before = torch.load(checkpoint, weights_only=True)["state_dict"]
        alone, together = (one_more_epoch(arguments, checkpoint, folder / str(count), count) for count in (1, 2))
        apart = {
            name: float((together[name] - alone[name]).norm() / (alone[name] - start).norm())
            for name, start in before.items()
            if name.endswith(("weight", "bias"))
        }
        assert max(apart.values()) < 0.01, apart

    def one_more_epoch(arguments: list[str], checkpoint: Path, folder: Path, processes: int) -> Any:
        options = {
            "ckpt_path": checkpoint,
            "data.init_args.batch_size": 4 // processes,
            "trainer.max_epochs": EPOCHS + 1,
            "trainer.limit_val_batches": 0,
            "trainer.accelerator": "cpu",
            "trainer.devices": processes,
            "trainer.strategy": "ddp" if processes > 1 else "auto",
            "trainer.callbacks+": "stage_process.FreezeStatistics",
        }
        result = run_process(arguments, folder, *(f"--{name}={value}" for name, value in options.items()))
        assert result.returncode == 0, result.stderr
        content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        return content["state_dict"]

    return check


@pytest.fixture(scope="session")
def require_same_state() -> Callable[..., None]:
    """The function :func:`assert_same_state`."""
    return assert_same_state


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different
