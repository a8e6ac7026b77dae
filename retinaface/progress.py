"""Progress bars of long work."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_T = TypeVar("_T")


def with_progress(sequence: Sequence[_T], description: str) -> Iterable[_T]:
    """Iterates with a progress bar on standard error, where that is a terminal; the bar goes when all is done."""
    console = Console(stderr=True)
    return track(sequence, description, console=console, transient=True, disable=not console.is_terminal)
