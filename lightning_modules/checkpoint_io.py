"""Saves checkpoints so that a killed process leaves the old or the new one, never half of one."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames.

    Lightning's own way writes to the system's temporary folder, from where moving to another file system is a copy.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        super().save_checkpoint(checkpoint, part, storage_options)
        part.replace(path)
