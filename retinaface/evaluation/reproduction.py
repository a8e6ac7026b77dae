"""What it takes to do a run again."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Commit:
    """A state of the code.

    Attributes:
        name: The git commit, 40 digits.
        changed: Whether files that git knows differ from it.
    """

    name: str
    changed: bool


@dataclass(frozen=True)
class Reproduction:
    """What it takes to do a run again, on the same photos.

    Attributes:
        command: As typed.
        recipe: Text of the recipe's file.
        seeds: Stage to its seed; None where none was set.
        commit: The code that the report was made with; None where it is not under git.
    """

    command: str
    recipe: str
    seeds: Mapping[str, int | bool | None]
    commit: Commit | None


def current_commit(folder: Path) -> Commit | None:
    """Asks git for the state of a folder; None where there is no git, or the folder is not under it."""
    try:
        name = _git(folder, "rev-parse", "--verify", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return Commit(name, bool(changes))


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
