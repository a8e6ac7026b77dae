"""Progress bars of long work."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

_T = TypeVar("_T")
_Item = TypeVar("_Item", covariant=True)


class SizedIterable(Protocol[_Item]):
    """What can be counted and gone through, again and again; a sequence need not be."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[_Item]: ...


def with_progress(items: SizedIterable[_T], description: str) -> Iterable[_T]:
    """Iterates with a progress bar on standard error, where that is a terminal; the bar goes when all is done.

    A length of 0 means that it is not known.
    """
    console = Console(stderr=True)
    return track(
        items,
        escape(description),
        total=len(items) or None,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
