"""Files that are there whole, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a file to write to, which takes the place of the one that is meant when it is complete.

    Whoever is interrupted, or reads meanwhile, has what was there before or the new one.

    Args:
        path: The file that is meant, in a folder that exists.

    Yields:
        A hidden file beside it, with the same suffix. Where nothing was written to it, nothing happens.

    Raises:
        OSError: It cannot take its place; what was there before stays.
    """
    # Names of more than 255 bytes are too long for most file systems.
    stem = os.fsdecode(os.fsencode(path.stem)[: 240 - len(path.suffix)])
    part = path.with_name(f".{stem}.part{path.suffix}")
    part.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield part
        if part.exists():
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # else a power failure may leave the name without the content
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()
