"""Saves checkpoints so that a killed process leaves the old or the new one, and finds what a fit can go on from."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from retinaface.errors import InputError, one_line
from retinaface.model.checkpoints import read_torch_file

REQUEUED = "requeued.ckpt"
"""What ``callbacks.Requeue`` saves."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; what the target was before stays beside it, see :func:`previous_of`.

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
            if path.exists():
                path.replace(previous_of(path))
            part.replace(path)
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
    return path.with_name(f"{path.name}.previous")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, by time of writing, that a fit can go on from.

    Says which newer ones are damaged.

    Returns:
        The file, or None if there is no checkpoint at all.

    Raises:
        InputError: There are some, and all are damaged.
    """
    files = [*folder.glob("*.ckpt"), *folder.glob("*.ckpt.previous")]
    damaged = None
    for path in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.suffix == ".ckpt"), reverse=True):
        try:
            check_resumable(path)
        except InputError as error:
            damaged = error
            rank_zero_info(f"damaged checkpoint passed over: {one_line(error)}")
            continue
        if damaged is not None:
            rank_zero_info(f"going on from the one before it: {path}")
        return path
    if damaged is not None:
        raise InputError(f"{damaged}; nor can any other one in {folder} be read: delete them to start anew")
    return None


def check_resumable(path: str | Path) -> None:
    """Whether a fit can go on from a file; Lightning would answer a foreign one with a traceback.

    Raises:
        InputError: It is missing, damaged, or not a checkpoint of a fit.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not {"structure", "pytorch-lightning_version"} <= content.keys():
        raise InputError(
            f"{path}: not a checkpoint that train.py saved, and --ckpt_path goes on only from those; give weights to "
            "start from with --model.init_args.weights"
        )
