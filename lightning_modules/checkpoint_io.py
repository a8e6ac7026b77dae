"""Saves checkpoints so that a killed process leaves the old or the new one, and finds what a fit can go on from."""

import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from retinaface.errors import InputError, one_line
from retinaface.model.checkpoints import DAMAGED, is_whole, read_torch_file

if sys.platform != "win32":
    import fcntl

REQUEUED = "requeued.ckpt"
"""What ``callbacks.Requeue`` saves."""

_PREVIOUS = ".previous"
_PATIENCE = 120  # seconds; NFS notices after 90 that a client is gone
_kept: dict[Path, IO[str]] = {}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; what the target was before stays beside it, see :func:`previous_of`.

    What ``callbacks.Requeue`` had saved in the folder is then out of date, and is deleted.

    Lightning's own way writes to the system's temporary folder, from where moving to another file system is a copy, and
    leaves it to the system when the content reaches the disk.

    Raises:
        InputError: The disk is full, or the folder cannot be written to. The checkpoints that are there stay.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(part, content.getbuffer())
            if is_whole(path):  # a damaged one must not take the place of the good one before it
                path.replace(previous_of(path))
            part.replace(path)
            if path.name != REQUEUED:
                requeued = path.with_name(REQUEUED)
                for outdated in (requeued, previous_of(requeued)):
                    outdated.unlink(missing_ok=True)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(
                f"{path}: cannot be written ({error.strerror or error}); it needs {len(content.getbuffer()):,} bytes. "
                "What was saved before is still there: make room, then start the same command again"
            ) from error


def _write(path: Path, content: memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a power failure may leave the name without the content


def previous_of(path: Path) -> Path:
    """Where the checkpoint stays that a newer one of the same name has replaced."""
    return path.with_name(f"{path.name}{_PREVIOUS}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in a folder that is furthest on, among those that a fit can go on from.

    Training steps decide, not times of writing: clocks jump, and copies have times of their own. What a file has
    replaced counts only if that file is damaged. Says which it found damaged; of those that can be opened, all content
    is read from the one furthest on downwards, until one is whole.

    Returns:
        The file, or None if there is no checkpoint at all.

    Raises:
        InputError: There are some, and all are damaged.
    """
    names = {path.name for path in folder.glob("*.ckpt")}
    names |= {path.name.removesuffix(_PREVIOUS) for path in folder.glob(f"*.ckpt{_PREVIOUS}")}
    # Of two with as many steps the first is taken: the end of an epoch is further on than any moment within it.
    files = [folder / name for name in sorted(names, key=lambda name: (name == REQUEUED, name))]
    damaged: dict[Path, InputError] = {}
    while (newest := _furthest_on(files, damaged)) is not None and not is_whole(newest):
        damaged[newest] = InputError(f"{newest}: {DAMAGED}")
    for error in damaged.values():
        rank_zero_info(f"damaged checkpoint passed over: {one_line(error)}")
        if newest is None:
            raise InputError(f"{error}; nor can any other one in {folder} be read: delete them to start anew")
    if damaged:
        rank_zero_info(f"going on from {newest} instead")
    return newest


def _furthest_on(files: Sequence[Path], damaged: dict[Path, InputError]) -> Path | None:
    """The first file with most steps, or what was before it, without those found damaged, to which it adds more."""
    steps: dict[Path, int] = {}
    for file in files:
        for path in (file, previous_of(file)):
            if path in damaged or not path.is_file():
                continue
            try:
                steps[path] = read_resumable(path, mmap=True)["global_step"]
                break
            except InputError as error:
                damaged[path] = error
    return max(steps, key=steps.__getitem__, default=None)


def read_resumable(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """What is in a checkpoint that a fit can go on from; Lightning would answer a foreign one with a traceback.

    Args:
        path: The checkpoint.
        mmap: Whether to leave the tensors in the file; then their content is not checked, see
            :func:`retinaface.model.checkpoints.is_whole`.

    Raises:
        InputError: It is missing, damaged, or not a checkpoint of a fit.
    """
    content = read_torch_file(path, mmap)
    if not isinstance(content, dict) or not {"structure", "global_step", "pytorch-lightning_version"} <= content.keys():
        raise InputError(
            f"{path}: not a checkpoint that train.py saved, and --ckpt_path goes on only from those; give weights to "
            "start from with --model.init_args.weights"
        )
    return content


def keep_for_this_process(folder: Path) -> None:
    """Lets no other process train into a folder until this one ends: their checkpoints would replace each other's.

    The system knows it, over NFS too; where a file system does not, nothing is kept. Who trains there may just be
    ending, or be on a node that is gone, which the server of a file system takes a while to notice.

    Raises:
        InputError: Another process trains into it, and has not ended after two minutes.
    """
    if sys.platform == "win32" or folder in _kept:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error
    for second in range(_PATIENCE):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's not inherited by the loader's processes
        except BlockingIOError:
            if second == 0:
                rank_zero_info(f"{folder}: another process trains into it; waiting for its end")
            time.sleep(1)
        except OSError:
            break
        else:
            break
    else:
        file.close()
        raise InputError(f"{folder}: another process trains into it; wait for its end, or give this one another folder")
    _kept[folder] = file
