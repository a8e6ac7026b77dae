"""Whole trainings that are broken from outside, and end as if nothing had happened."""

import os
import signal

import pytest
import torch

pytestmark = pytest.mark.slow

GOES_ON = ["--ckpt_path=last", "--trainer.callbacks+=stage_process.GoesOn"]


@pytest.fixture
def arguments(tiny_root, make_stage_arguments):
    return make_stage_arguments("teacher", tiny_root, "--model.init_args.network.channels=16")


@pytest.fixture
def end(arguments, tmp_path, run_process):
    """The weights that an undisturbed training ends with."""
    assert run_process(arguments, tmp_path / "undisturbed").returncode == 0
    return weights(tmp_path / "undisturbed")


def last_checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def weights(folder):
    return last_checkpoint(folder)["state_dict"]


def steps(folder):
    return last_checkpoint(folder)["global_step"]


def error_of(result):
    """The one line that a training has ended with."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    return error


def test_a_training_that_accumulates_gradients_is_killed(arguments, tmp_path, run_process, require_same_state):
    """An epoch of two batches is one step."""
    arguments = [*arguments, "--trainer.accumulate_grad_batches=2"]
    assert run_process(arguments, tmp_path / "undisturbed").returncode == 0
    killed = run_process(arguments, tmp_path / "cut", "--trainer.callbacks+=stage_process.KillInSecondEpoch")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_process(arguments, tmp_path / "cut", *GOES_ON)
    assert again.returncode == 0, again.stderr
    assert steps(tmp_path / "cut") == steps(tmp_path / "undisturbed") == 3
    require_same_state(weights(tmp_path / "cut"), weights(tmp_path / "undisturbed"))


def test_a_disk_that_is_full_in_the_second_epoch(arguments, end, mount_disk, run_process, require_same_state):
    disk = mount_disk("64m")
    result = run_process(arguments, disk, "--trainer.callbacks+=stage_process.FillDiskInSecondEpoch")
    error = error_of(result)
    assert "No space left on device" in error
    assert str(disk) in error
    (disk / "filler").unlink()
    again = run_process(arguments, disk, *GOES_ON)
    assert again.returncode == 0, again.stderr
    require_same_state(weights(disk), end)


def test_a_loader_that_dies(arguments, end, tmp_path, run_process, require_same_state):
    arguments = [*arguments, "--data.init_args.num_workers=1"]
    dies_in = "--trainer.callbacks+=stage_process.KillLoaderInSecondEpoch"
    dies = run_process(arguments, tmp_path, "--ckpt_path=last", dies_in)  # the same command from the beginning
    error = error_of(dies)
    assert error.startswith("error: data: ")  # a dead process or a closed connection, whatever was noticed first
    assert "lower data.init_args.num_workers" in error
    assert last_checkpoint(tmp_path)["epoch"] == 0
    again = run_process(arguments, tmp_path, *GOES_ON)
    assert again.returncode == 0, again.stderr
    assert last_checkpoint(tmp_path)["epoch"] == 2
    require_same_state(weights(tmp_path), end)


def test_a_last_checkpoint_that_is_damaged(arguments, end, tmp_path, run_process, require_same_state):
    folder = tmp_path / "undisturbed"
    last = folder / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    again = run_process(arguments, folder, *GOES_ON)
    assert again.returncode == 0, again.stderr
    assert "last.ckpt" in again.stderr + again.stdout
    assert "damaged" in again.stderr + again.stdout
    require_same_state(weights(folder), end)
