"""Whole trainings that are broken from outside, and end as if nothing had happened."""

import os
import signal
import subprocess

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


@pytest.fixture
def disk(tmp_path):
    """A small disk, of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk, where that is allowed")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def last_checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def weights(folder):
    return last_checkpoint(folder)["state_dict"]


def steps(folder):
    return last_checkpoint(folder)["global_step"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)


def test_a_training_that_accumulates_gradients_is_killed(arguments, tmp_path, run_process):
    """An epoch of two batches is one step."""
    arguments = [*arguments, "--trainer.accumulate_grad_batches=2"]
    assert run_process(arguments, tmp_path / "undisturbed").returncode == 0
    killed = run_process(arguments, tmp_path / "cut", "--trainer.callbacks+=stage_process.KillInSecondEpoch")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_process(arguments, tmp_path / "cut", *GOES_ON)
    assert again.returncode == 0, again.stderr
    assert steps(tmp_path / "cut") == steps(tmp_path / "undisturbed") == 3
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "undisturbed"))


def test_a_disk_that_is_full_in_the_second_epoch(arguments, end, disk, run_process):
    result = run_process(arguments, disk, "--trainer.callbacks+=stage_process.FillDiskInSecondEpoch")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error:"))
    assert "No space left on device" in error
    assert str(disk) in error
    (disk / "filler").unlink()
    again = run_process(arguments, disk, *GOES_ON)
    assert again.returncode == 0, again.stderr
    assert same(weights(disk), end)


def test_a_loader_that_dies(arguments, end, tmp_path, run_process):
    arguments = [*arguments, "--data.init_args.num_workers=1"]
    dies = run_process(arguments, tmp_path, "--trainer.callbacks+=stage_process.KillLoaderInSecondEpoch")
    assert dies.returncode == 2, dies.stderr
    again = run_process(arguments, tmp_path, *GOES_ON)
    assert again.returncode == 0, again.stderr
    assert same(weights(tmp_path), end)


def test_a_last_checkpoint_that_is_damaged(arguments, end, tmp_path, run_process):
    folder = tmp_path / "undisturbed"
    last = folder / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    again = run_process(arguments, folder, *GOES_ON)
    assert again.returncode == 0, again.stderr
    assert "last.ckpt" in again.stderr + again.stdout
    assert "damaged" in again.stderr + again.stdout
    assert same(weights(folder), end)
