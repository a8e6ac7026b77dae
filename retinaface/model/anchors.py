"""The anchors that deltas are relative to."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def make_anchors(
    height: int,
    width: int,
    anchor_sizes: Sequence[Sequence[int]],
    strides: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Lays square anchors of every size over the centre of every position of every level.

    Args:
        height: Picture height in pixels.
        width: Picture width in pixels.
        anchor_sizes: Side lengths in pixels, per level; tuples, as in ``NetworkConfig``.
        strides: Pixels per position, per level, a tuple; a level has ``ceil(height / stride)`` rows.
        device: Where to put them. The result is cached and must not be changed.

    Returns:
        ``(A, 4)`` float32 cxcywh, relative to width and height (may reach past 1 where the stride does not divide the
        size), ordered by level, row, column, size.
    """
    levels = []
    scale = torch.tensor([width, height], dtype=torch.float32)
    for sizes, stride in zip(anchor_sizes, strides, strict=True):
        # Not -(-height // stride): in an ONNX file whole numbers are divided towards zero.
        rows = (torch.arange((height + stride - 1) // stride) + 0.5) * stride
        columns = (torch.arange((width + stride - 1) // stride) + 0.5) * stride
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1) / scale
        sides = torch.tensor(sizes, dtype=torch.float32)[:, None] / scale
        shape = (*centres.shape[:2], len(sizes), 2)
        levels.append(torch.cat([centres[:, :, None].expand(shape), sides.expand(shape)], dim=-1).reshape(-1, 4))
    return torch.cat(levels).to(device)


@lru_cache(maxsize=64)
def picture_size(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Width and height as a ``(2,)`` float32 tensor on a device, cached so that no step waits for the copy."""
    return torch.tensor([width, height], dtype=torch.float32, device=device)
