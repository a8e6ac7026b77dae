import errno
import os
import subprocess

import pytest
import torch

from lightning_modules import AtomicCheckpointIO, checkpoint_io
from lightning_modules.checkpoint_io import newest_checkpoint, previous_of
from retinaface.errors import InputError


def content(value):
    return {
        "state_dict": {"weight": torch.full((100,), value)},
        "epoch": int(value),
        "structure": {},
        "pytorch-lightning_version": "2",
    }


def save(path, value):
    AtomicCheckpointIO().save_checkpoint(content(value), path)


def load(path):
    return AtomicCheckpointIO().load_checkpoint(path)


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_saves_and_keeps_the_one_before(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    save(path, 1.0)
    assert names(path.parent) == {"last.ckpt"}
    save(str(path), 2.0)
    save(path, 3.0)
    assert names(path.parent) == {"last.ckpt", "last.ckpt.previous"}
    assert torch.equal(load(path)["state_dict"]["weight"], content(3.0)["state_dict"]["weight"])
    assert load(previous_of(path))["epoch"] == 2


def test_full_disk_is_one_line_and_leaves_the_old_files(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, 1.0)
    save(path, 2.0)

    def half(file, content):
        file.write_bytes(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io, "_write", half)
        with pytest.raises(
            InputError, match=r"last.ckpt: cannot be written \(No space left on device\); it needs .* make"
        ):
            save(path, 3.0)
    assert names(tmp_path) == {"last.ckpt", "last.ckpt.previous"}  # half a file would only fill the disk further
    assert (load(path)["epoch"], load(previous_of(path))["epoch"]) == (2, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        save(disk / "last.ckpt", 1.0)
        big = {**content(2.0), "state_dict": {"weight": torch.zeros(100_000)}}
        with pytest.raises(InputError, match="No space left on device"):
            AtomicCheckpointIO().save_checkpoint(big, disk / "last.ckpt")
        assert names(disk) == {"last.ckpt"}
        assert load(disk / "last.ckpt")["epoch"] == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, 1.0)

    def killed(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            save(path, 2.0)
    assert names(tmp_path) == {"last.ckpt", "last.ckpt.part"}  # in the same folder, so that renaming is no copy
    assert newest_checkpoint(tmp_path) == path
    assert load(path)["epoch"] == 1
    save(path, 3.0)  # over what was left half written
    assert names(tmp_path) == {"last.ckpt", "last.ckpt.previous"}
    assert load(path)["epoch"] == 3


def test_unsavable_content_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1.0)
    with pytest.raises((TypeError, AttributeError)):
        AtomicCheckpointIO().save_checkpoint({"callback": lambda: None}, path)
    assert names(tmp_path) == {"last.ckpt"}
    assert load(path)["epoch"] == 1


def written(path, value, time):
    save(path, value)
    os.utime(path, ns=(time, time))


def test_the_newest_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert newest_checkpoint(tmp_path) is None
    last, queue = tmp_path / "last.ckpt", tmp_path / "requeued.ckpt"
    written(last, 1.0, 10)
    written(queue, 2.0, 20)
    assert newest_checkpoint(tmp_path) == queue
    written(last, 3.0, 30)
    assert newest_checkpoint(tmp_path) == last
    last.unlink()  # as if killed between the two renamings
    os.utime(previous_of(last), ns=(25, 25))
    assert newest_checkpoint(tmp_path) == previous_of(last)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half", "foreign"])
def test_a_damaged_checkpoint_is_passed_over_aloud(damage, tmp_path, caplog):
    path = tmp_path / "last.ckpt"
    written(path, 1.0, 10)
    written(path, 2.0, 20)
    if damage == "foreign":
        torch.save({"weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(path.read_bytes()[:500] if damage == "half" else damage)
    with caplog.at_level("INFO"):
        assert newest_checkpoint(tmp_path) == previous_of(path)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"damaged checkpoint passed over: {path}: not a checkpoint")
    assert second == f"going on from the one before it: {previous_of(path)}"
    previous_of(path).write_bytes(b"")
    with pytest.raises(InputError, match="delete them to start anew"):
        newest_checkpoint(tmp_path)
