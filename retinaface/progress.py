"""Progress bars of long work."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

_T = TypeVar("_T")
_Result = TypeVar("_Result")
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


def in_parallel(
    work: Callable[[_T], _Result], items: Sequence[_T], description: str, threads: int
) -> Iterator[_Result]:
    """Works on several items at once, with a progress bar; where that ends early, what is not begun is left.

    Args:
        work: Called with each item, with one thread in this one.
        items: What to work on.
        description: What the progress bar says.
        threads: How many at once.

    Yields:
        The results, in the order of the items.
    """
    if threads == 1:
        yield from map(work, with_progress(items, description))
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(work, item) for item in items]
            for future in with_progress(futures, description):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
