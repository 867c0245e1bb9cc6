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

__all__ = ["closest", "find_neighbours", "find_rows"]


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
    coordinates, rest = [], cells
    for length in reversed(size[1:]):
        coordinates.append(rest % length)
        rest = rest // length
    near = [coordinate + steps for coordinate in (rest, *reversed(coordinates))]
    clamped = [x.clamp(0, length - 1) for x, length in zip(near, size, strict=True)]
    index, inside = clamped[0], near[0] == clamped[0]
    for x, in_map, length in zip(near[1:], clamped[1:], size[1:], strict=True):
        index = torch.add(in_map, index[:, None], alpha=length).flatten(0, 1)
        inside = (inside[:, None] & (x == in_map)).flatten(0, 1)
    return index, inside


def closest(
    index: Annotated[Tensor, "5^D B N"], inside: Annotated[Tensor, "5^D B N"]
) -> tuple[Annotated[Tensor, "3^D B N"], Annotated[Tensor, "3^D B N"]]:
    """Of what :func:`find_neighbours` gives for radius 2 what it gives for radius 1."""
    dims = 2 if index.shape[0] == 5**2 else 3
    middle = (slice(1, 4),) * dims
    index, inside = (x.unflatten(0, [5] * dims)[middle].flatten(0, dims - 1) for x in (index, inside))
    return index, inside


def find_rows(
    index: Annotated[Tensor, "K B N"],
    inside: Annotated[Tensor, "K B N"],
    size: Sequence[int],
    *,
    every_pixel: bool = False,
) -> Annotated[Tensor, "B*N K"]:
    """For each keypoint the rows of the pixels at most one away; row 0 stands for all pixels without a row.

    Row 1 + i belongs to neighbour i. Where keypoints are close, several rows could stand for one
    pixel: the last of them does, and the others stay empty.

    Args:
        index: of the neighbours, as :func:`find_neighbours` gives it for radius 1.
        inside: which neighbours are in the map.
        size: the map's size.
        every_pixel: makes row 1 + i that of pixel i of the batch.

    Example:
        >>> neighbours = find_neighbours(torch.tensor([[0, 1]]), (1, 4), radius=1)
        >>> find_rows(*neighbours, (1, 4))[:, 3:6].tolist()
        [[0, 9, 11], [9, 11, 12]]
    """
    pixels = batch_index(index, size)
    if every_pixel:
        rows = pixels + 1
    else:
        own = torch.arange(1, 1 + pixels.numel(), device=index.device, dtype=torch.int32)
        # Only what is written is read, so the table need not be initialised.
        table = own.new_empty(index.shape[1] * prod(size))
        table.scatter_reduce_(0, pixels.flatten(), own.where(inside.flatten(), 0), "amax", include_self=False)
        rows = table[pixels].long()
    return torch.where(inside, rows, 0).flatten(1).mT.contiguous()
