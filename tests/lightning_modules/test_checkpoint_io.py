import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_modules import AtomicCheckpointIO


def content(value):
    return {"state_dict": {"weight": torch.full((100,), value)}, "epoch": int(value)}


@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
def test_saves_and_leaves_nothing_beside(before, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    if before:
        AtomicCheckpointIO().save_checkpoint(content(1.0), path)
    AtomicCheckpointIO().save_checkpoint(content(2.0), str(path))
    saved = AtomicCheckpointIO().load_checkpoint(path)
    assert saved["epoch"] == 2
    assert torch.equal(saved["state_dict"]["weight"], content(2.0)["state_dict"]["weight"])
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1.0), path)
    before = path.read_bytes()
    written = []

    def half(self, checkpoint, path, storage_options=None):
        written.append(path)
        path.write_bytes(before[:100])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TorchCheckpointIO, "save_checkpoint", half)
        with pytest.raises(OSError, match="No space left"):
            AtomicCheckpointIO().save_checkpoint(content(2.0), path)
    assert written == [tmp_path / "last.ckpt.part"]  # in the same folder, so that renaming is no copy
    assert path.read_bytes() == before
    AtomicCheckpointIO().save_checkpoint(content(3.0), path)  # over what was left half written
    assert AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_unsavable_content_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1.0), path)
    with pytest.raises((TypeError, AttributeError)):
        AtomicCheckpointIO().save_checkpoint({"callback": lambda: None}, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 1
