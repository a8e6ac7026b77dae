import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules import AtomicCheckpointIO, checkpoint_io
from lightning_modules.checkpoint_io import keep_for_this_process, newest_checkpoint, previous_of
from retinaface.errors import InputError

ROOT = Path(__file__).parents[2]


def content(value):
    return {
        "state_dict": {"weight": torch.full((100,), value)},
        "epoch": int(value),
        "global_step": 10 * int(value),
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


def test_a_disk_that_is_really_full(mount_disk):
    disk = mount_disk("16k")
    save(disk / "last.ckpt", 1.0)
    big = {**content(2.0), "state_dict": {"weight": torch.zeros(100_000)}}
    with pytest.raises(InputError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint(big, disk / "last.ckpt")
    assert names(disk) == {"last.ckpt"}
    assert load(disk / "last.ckpt")["epoch"] == 1


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


def test_what_a_requeued_job_saved_goes_with_the_next_checkpoint(tmp_path):
    queue = tmp_path / "requeued.ckpt"
    save(tmp_path / "last.ckpt", 1.0)
    save(queue, 2.0)
    save(queue, 3.0)
    assert names(tmp_path) == {"last.ckpt", "requeued.ckpt", "requeued.ckpt.previous"}
    save(tmp_path / "last.ckpt", 4.0)
    assert names(tmp_path) == {"last.ckpt", "last.ckpt.previous"}


def test_what_cannot_be_deleted_is_one_line(tmp_path):
    (tmp_path / "requeued.ckpt").mkdir()
    with pytest.raises(InputError, match=r"last.ckpt: cannot be written"):
        save(tmp_path / "last.ckpt", 1.0)


def test_the_checkpoint_furthest_on_whatever_the_clock_says(tmp_path):
    """The clock was set back before each save, so every file is older than the one that it came after."""
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert newest_checkpoint(tmp_path) is None
    last, best, queue = (tmp_path / f"{name}.ckpt" for name in ("last", "best", "requeued"))

    def save_at(path, value, time):
        save(path, value)
        os.utime(path, ns=(time, time))

    save_at(last, 1.0, 80)
    save_at(best, 1.0, 70)
    save_at(last, 2.0, 60)
    assert newest_checkpoint(tmp_path) == last
    save_at(queue, 3.0, 50)
    assert newest_checkpoint(tmp_path) == queue
    save_at(queue, 2.0, 40)  # in the validation that ended the epoch of last.ckpt, which was saved after it
    assert newest_checkpoint(tmp_path) == last
    save_at(last, 4.0, 30)
    assert newest_checkpoint(tmp_path) == last
    last.unlink()  # as if killed between the two renamings
    assert newest_checkpoint(tmp_path) == previous_of(last)


def test_only_what_is_taken_is_read_as_a_whole(tmp_path, monkeypatch):
    for name, value in (("last", 2.0), ("last", 3.0), ("best", 1.0)):
        save(tmp_path / f"{name}.ckpt", value)
    read = []
    monkeypatch.setattr(checkpoint_io, "is_whole", lambda path: read.append(path) or len(read) > 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "best.ckpt"
    assert read == [tmp_path / "last.ckpt", tmp_path / "last.ckpt.previous", tmp_path / "best.ckpt"]


def test_a_run_begun_anew_in_the_same_folder_comes_before_what_it_replaced(tmp_path):
    save(tmp_path / "last.ckpt", 9.0)
    save(tmp_path / "last.ckpt", 1.0)
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    place = content.index(np.full(100, 2.0, np.float32).tobytes())  # in the weights: torch would load it
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not a checkpoint"),
    "half": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "foreign": lambda path: torch.save({"weight": torch.zeros(1)}, path),
    "bit": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_aloud(damage, tmp_path, caplog):
    path = tmp_path / "last.ckpt"
    save(path, 1.0)
    save(path, 2.0)
    DAMAGES[damage](path)
    with caplog.at_level("INFO"):
        assert newest_checkpoint(tmp_path) == previous_of(path)
    first, second = (record.getMessage() for record in caplog.records)
    what = "damaged, its checksums" if damage == "bit" else "not a checkpoint"
    assert first.startswith(f"damaged checkpoint passed over: {path}: {what}")
    assert second == f"going on from {previous_of(path)} instead"
    if damage != "foreign":
        save(path, 3.0)  # a kill between its two renamings must still leave something to go on from
        assert load(previous_of(path))["epoch"] == 1
    path.write_bytes(b"")
    previous_of(path).write_bytes(b"")
    with pytest.raises(InputError, match="delete them to start anew"):
        newest_checkpoint(tmp_path)


HOLD = """
import sys
from pathlib import Path
from lightning_modules.checkpoint_io import keep_for_this_process
keep_for_this_process(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


def test_one_process_trains_into_a_folder(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "checkpoints"
    monkeypatch.setattr(checkpoint_io, "_PATIENCE", 2)
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline()
        with caplog.at_level("INFO"), pytest.raises(InputError, match=r"checkpoints: another process trains into it"):
            keep_for_this_process(folder)
        assert [record.getMessage() for record in caplog.records] == [
            f"{folder}: another process trains into it; waiting for its end"
        ]
        keep_for_this_process(tmp_path / "another")
        other.kill()
    keep_for_this_process(folder)
    keep_for_this_process(folder)  # it is this process's own
    (folder / ".lock").unlink()


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="checkpoints: cannot be written to"):
        keep_for_this_process(tmp_path / "file" / "checkpoints")
