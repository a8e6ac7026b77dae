"""Keeps a parsed split next to the run, so that later starts read it in no time."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaface.data.annotations import (
    Sample,
    Split,
    SplitIndex,
    annotation_files,
    find_photos,
    images_folder,
    read_split,
    usable_samples,
)

_VERSION = 1  # raise it when the same annotations give other samples, or the file's content changes


def load_cached_split(root: Path | str, split: Split, folder: Path | str) -> list[Sample]:
    """Does what ``load_split`` does, but keeps the result as ``annotations_{split}.npz``.

    The file is used as long as its key fits: a hash of the content of the annotation files and of the list of photos.
    Where they are has no part in it, so data may be moved. A file that does not fit, is damaged or cannot be written
    costs only the time to parse.

    Args:
        root: The data root.
        split: ``train`` or ``val``.
        folder: Where the file goes, the run's folder for instance. Several processes may use it at the same time.

    Returns:
        See ``load_split``.

    Raises:
        InputError: See ``load_split``.
    """
    images = images_folder(root, split)
    file = Path(folder) / f"annotations_{split}.npz"
    key = _key(root, split, images)
    index = _read(file, key, images)
    if index is not None:
        return usable_samples(index, images)
    index = read_split(root, split)
    samples = usable_samples(index, images)
    with suppress(OSError):
        _write(file, key, index, images)
    return samples


def _key(root: Path | str, split: Split, images: Path) -> str:
    digest = hashlib.sha256(f"{_VERSION} {split}".encode())
    for file in annotation_files(root, split):
        content = file.read_bytes()
        digest.update(f"\0{file.name} {len(content)}\0".encode())
        digest.update(content)
    digest.update(os.fsencode("\0".join(find_photos(images))))
    return digest.hexdigest()


def _write(file: Path, key: str, index: SplitIndex, images: Path) -> None:
    """Replaces the file in one step: whoever reads at the same time finds a whole one."""
    samples = index.samples
    arrays: dict[str, Any] = {
        "key": np.array(key),
        "paths": np.array([sample.path.relative_to(images).as_posix() for sample in samples]),
        "names": np.array([sample.name for sample in samples]),
        "faces": np.array([len(sample.boxes) for sample in samples]),
        "boxes": np.concatenate([sample.boxes for sample in samples]),
        "landmarks": np.concatenate([sample.landmarks for sample in samples]),
        "absent": np.array(index.absent, dtype=np.str_),
        "unlisted": np.array(index.unlisted, dtype=np.str_),
        "official": np.array(index.official),
    }
    for subset in samples[0].counted:
        arrays[f"counted_{subset}"] = np.concatenate([sample.counted[subset] for sample in samples])
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.stem}-", dir=file.parent) as scratch:
        part = Path(scratch) / file.name
        np.savez(part, **arrays)
        part.replace(file)


def _read(file: Path, key: str, images: Path) -> SplitIndex | None:
    """The index, or None where the file is absent, damaged or of other data."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            return _unpack({name: stored[name] for name in stored.files}, images)
    except Exception:  # numpy and zipfile raise a dozen kinds for what is damaged
        return None


def _unpack(content: dict[str, NDArray[Any]], images: Path) -> SplitIndex:
    ends = np.cumsum(content["faces"]).tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    counted = {name.removeprefix("counted_"): array for name, array in content.items() if name.startswith("counted_")}
    samples = [
        Sample(
            images / path,
            name,
            content["boxes"][part],
            content["landmarks"][part],
            {subset: array[part] for subset, array in counted.items()},
        )
        for path, name, part in zip(content["paths"].tolist(), content["names"].tolist(), parts, strict=True)
    ]
    return SplitIndex(samples, content["absent"].tolist(), content["unlisted"].tolist(), bool(content["official"]))
