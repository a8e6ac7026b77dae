"""What several processes learn is what one learns that has all their photos."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]

pytestmark = pytest.mark.slow


@pytest.fixture
def teacher_arguments(tiny_root, tiny_checkpoint, make_stage_arguments):
    options = ["--model.init_args.network.channels=16", f"--model.init_args.weights={tiny_checkpoint}"]
    return make_stage_arguments("teacher", tiny_root, *options)


def test_two_processes_end_with_the_same_teacher(teacher_arguments, tmp_path, check_two_processes):
    check_two_processes(teacher_arguments, tmp_path)


def test_one_of_two_processes_begins_a_run_on_wandb(teacher_arguments, tmp_path, run_process, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    options = [f"--config={ROOT / 'configs' / 'wandb.yaml'}", "--trainer.max_epochs=1"]
    result = run_process(teacher_arguments, tmp_path, *options, *TWO_PROCESSES)
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert any(file.suffix == ".wandb" for file in run.iterdir())


def test_teacher(teacher_arguments, tmp_path, run_process, check_half_the_batch):
    assert run_process(teacher_arguments, tmp_path).returncode == 0
    check_half_the_batch(teacher_arguments, tmp_path / "checkpoints" / "last.ckpt", tmp_path)


def test_pruned_student(pruned_run, tmp_path, check_half_the_batch):
    check_half_the_batch(pruned_run.arguments, pruned_run.checkpoint, tmp_path)


def test_pruned_again_with_regularization(pruned_again_run, tmp_path, check_half_the_batch):
    check_half_the_batch(pruned_again_run.arguments, pruned_again_run.checkpoint, tmp_path)


@pytest.fixture
def distill_arguments(tiny_root, tiny_checkpoint, make_stage_arguments):
    start = [f"--model.init_args.{role}={tiny_checkpoint}" for role in ("student", "teacher")]
    return make_stage_arguments("distill", tiny_root, *start)


def test_two_processes_end_with_the_same_distilled_student(distill_arguments, tmp_path, check_two_processes):
    check_two_processes(distill_arguments, tmp_path)


def test_two_processes_calibrate_the_same(
    tiny_root, tiny_checkpoint, make_stage_arguments, tmp_path, run_process, require_same_state
):
    arguments = make_stage_arguments("ptq", tiny_root, f"--model.init_args.student={tiny_checkpoint}")
    result = run_process(arguments, tmp_path, *TWO_PROCESSES, "--trainer.callbacks+=stage_process.SaveEveryRank")
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2))
    require_same_state(second["after"], first["after"])
    assert any(name.endswith("scale") for name in first["after"])


@pytest.mark.parametrize("feature_loss", ["mse", "pkd", "cwd"])
def test_distilled_student(distill_arguments, feature_loss, tmp_path, run_process, check_half_the_batch):
    arguments = [*distill_arguments, f"--model.init_args.distillation.feature_loss={feature_loss}"]
    assert run_process(arguments, tmp_path).returncode == 0
    check_half_the_batch(arguments, tmp_path / "checkpoints" / "last.ckpt", tmp_path)


def test_fake_quantized_student(quantized_run, tmp_path, check_half_the_batch):
    """Ranges and statistics stand still by now.

    Nor does anything round: convolutions of two pictures and of four may differ in their last bit, by the CPU, and a
    value that falls on the other side of a rounding step moves all that comes after it.
    """
    arguments = [*quantized_run.arguments, "--trainer.callbacks+=stage_process.WithoutRounding"]
    check_half_the_batch(arguments, quantized_run.checkpoint, tmp_path)
