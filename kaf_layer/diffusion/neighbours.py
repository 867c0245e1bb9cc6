"""Which pixels lie around which keypoints, and which rows of the sparse diffusion network stand for them.

Positions in a neighbourhood come first, then samples and slots: K B N. All shapes follow from those of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated

import torch
from torch import Tensor

from kaf_layer.scattering import batch_index

__all__ = ["find_neighbours", "find_rows"]


def find_neighbours(
    cells: Annotated[Tensor, "B N"], size: Sequence[int], *, radius: int
) -> tuple[Annotated[Tensor, "K B N"], Annotated[Tensor, "K B N"]]:
    """The cells up to ``radius`` away on each axis, K = (2 * radius + 1)^D, and which of them are in the map.

    Args:
        cells: row-major indices in a map.
        size: the map's size.
        radius: in cells of the map.

    Example:
        >>> cells, inside = find_neighbours(torch.tensor([[4]]), (3, 4), radius=1)
        >>> torch.where(inside, cells, -1).flatten().tolist()
        [-1, 0, 1, -1, 4, 5, -1, 8, 9]
    """
    steps = torch.arange(-radius, radius + 1, device=cells.device)[:, None, None]
    index = torch.zeros_like(cells)[None]
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, length in enumerate(size):
        near = cells // prod(size[axis + 1 :]) % length + steps
        inside = (inside[:, None] & (near >= 0) & (near < length)).flatten(0, 1)
        index = (index[:, None] * length + near.clamp(0, length - 1)).flatten(0, 1)
    return index, inside


def find_rows(
    cells: Annotated[Tensor, "B N"], size: Sequence[int], *, every_pixel: bool = False
) -> Annotated[Tensor, "B*N K"]:
    """For each keypoint the rows of the pixels at most one away; row 0 stands for all pixels without a row.

    Row 1 + i belongs to neighbour i. Where keypoints are close, several rows could stand for one
    pixel: the last of them does, and the others stay empty.

    Args:
        cells: row-major indices in a map.
        size: the map's size.
        every_pixel: makes row 1 + i that of pixel i of the batch.

    Example:
        >>> find_rows(torch.tensor([[0, 1]]), (1, 4))[:, 3:6].tolist()
        [[0, 9, 11], [9, 11, 12]]
    """
    index, inside = find_neighbours(cells, size, radius=1)
    pixels = batch_index(index, size)
    if every_pixel:
        rows = pixels + 1
    else:
        own = torch.arange(1, 1 + pixels.numel(), device=cells.device, dtype=torch.int32)
        # Only what is written is read, so the table need not be initialised.
        table = own.new_empty(cells.shape[0] * prod(size))
        table.scatter_reduce_(0, pixels.flatten(), own.where(inside.flatten(), 0), "amax", include_self=False)
        rows = table[pixels].long()
    return torch.where(inside, rows, 0).flatten(1).mT.contiguous()
