"""What tests of annotations share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.io import savemat


def _cells(values: list) -> NDArray:
    """A MATLAB cell column."""
    column = np.empty((len(values), 1), dtype=object)
    column[:, 0] = values
    return column


def _write_difficulty(folder: Path, photos: dict[str, tuple[list, dict[str, list[int]]]], event: str = "a") -> None:
    """The four official files for one event: boxes ``x y w h`` and, counting from 1, who counts in each subset."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "event_list": _cells([event]),
        "file_list": _cells([_cells(list(photos))]),
        "face_bbx_list": _cells([_cells([np.array(boxes, dtype=np.int32) for boxes, _ in photos.values()])]),
    }
    savemat(folder / "wider_face_val.mat", common)
    for subset in ("easy", "medium", "hard"):
        indices = _cells([np.array(lists[subset], dtype=np.uint8).reshape(-1, 1) for _, lists in photos.values()])
        savemat(folder / f"wider_{subset}_val.mat", {**common, "gt_list": _cells([indices])})


@pytest.fixture(scope="session")
def write_difficulty() -> Callable[..., None]:
    """The function :func:`_write_difficulty`."""
    return _write_difficulty
