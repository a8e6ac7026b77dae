"""Saves checkpoints so that a killed process leaves the old or the new one, and finds what a fit can go on from."""

import io
import os
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from retinaface.errors import InputError, one_line
from retinaface.model.checkpoints import read_torch_file

REQUEUED = "requeued.ckpt"
"""What ``callbacks.Requeue`` saves."""

_PREVIOUS = ".previous"


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
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(
                f"{path}: cannot be written ({error.strerror or error}); it needs {len(content.getbuffer()):,} bytes. "
                "What was saved before is still there: make room, then start the same command again"
            ) from error
        if path.name != REQUEUED:
            requeued = path.with_name(REQUEUED)
            for outdated in (requeued, previous_of(requeued)):
                outdated.unlink(missing_ok=True)


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
    replaced counts only if that file is damaged. Says which are damaged.

    Returns:
        The file, or None if there is no checkpoint at all.

    Raises:
        InputError: There are some, and all are damaged.
    """
    names = {path.name for path in folder.glob("*.ckpt")}
    names |= {path.name.removesuffix(_PREVIOUS) for path in folder.glob(f"*.ckpt{_PREVIOUS}")}
    steps: dict[Path, int] = {}
    damaged = None
    # Of two with as many steps the first is taken: the end of an epoch is further on than any moment within it.
    for name in sorted(names, key=lambda name: (name == REQUEUED, name)):
        for path in filter(Path.is_file, (folder / name, previous_of(folder / name))):
            try:
                steps[path] = read_resumable(path)["global_step"]
                break
            except InputError as error:
                damaged = error
                rank_zero_info(f"damaged checkpoint passed over: {one_line(error)}")
    if damaged is not None and not steps:
        raise InputError(f"{damaged}; nor can any other one in {folder} be read: delete them to start anew")
    newest = max(steps, key=lambda path: steps[path], default=None)
    if damaged is not None:
        rank_zero_info(f"going on from {newest} instead")
    return newest


def read_resumable(path: str | Path) -> dict[str, Any]:
    """What is in a checkpoint that a fit can go on from; Lightning would answer a foreign one with a traceback.

    Raises:
        InputError: It is missing, damaged, or not a checkpoint of a fit.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not {"structure", "global_step", "pytorch-lightning_version"} <= content.keys():
        raise InputError(
            f"{path}: not a checkpoint that train.py saved, and --ckpt_path goes on only from those; give weights to "
            "start from with --model.init_args.weights"
        )
    if not is_whole(Path(path)):
        raise InputError(f"{path}: damaged, its checksums do not fit its content; restore it, or start without it")
    return content


def is_whole(path: Path) -> bool:
    """Whether a file is there with all its content unchanged: the checksums fit, which torch does not look at."""
    try:
        with ZipFile(path) as content:
            return content.testzip() is None
    except Exception:  # zipfile raises several kinds for what is damaged
        return False
