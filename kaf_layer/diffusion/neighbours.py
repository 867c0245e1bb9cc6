"""Which pixels lie around which keypoints, and which rows of the sparse diffusion network stand for them.

Neighbours are in the order of the weights of a convolution that reach them from the keypoint, so the last of all
pixels is the first. All shapes follow from those of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated

import torch
from torch import Tensor

from kaf_layer.scattering import batch_index

__all__ = ["closest", "find_neighbours", "find_rows", "padded_neighbours"]


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
        [9, 8, -1, 5, 4, -1, 1, 0, -1]
    """
    steps = torch.arange(radius, -radius - 1, -1, device=cells.device)
    coordinates, rest = [], cells
    for length in reversed(size[1:]):
        coordinates.append(rest % length)
        rest = rest // length
    # Each axis has all K steps: before torch 2.13, sums of one axis with another cannot be exported for any shape.
    ways = torch.cartesian_prod(*[steps] * len(size)).mT[..., None, None].unbind()
    near = [coordinate + way for coordinate, way in zip((rest, *reversed(coordinates)), ways, strict=True)]
    clamped = [x.clamp(0, length - 1) for x, length in zip(near, size, strict=True)]
    index, inside = clamped[0], near[0] == clamped[0]
    for x, in_map, length in zip(near[1:], clamped[1:], size[1:], strict=True):
        index = torch.add(in_map, index, alpha=length)
        inside = inside & (x == in_map)
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
    index: Annotated[Tensor, "K B N"], inside: Annotated[Tensor, "K B N"], size: Sequence[int]
) -> Annotated[Tensor, "B*N K"]:
    """For each keypoint the rows of the pixels at most one away; row 0 stands for all pixels without a row.

    Row 1 + i belongs to neighbour i. Where keypoints are close, several rows could stand for one
    pixel: the last of them does, and the others stay empty.

    Args:
        index: of the neighbours, as :func:`find_neighbours` gives it for radius 1.
        inside: which neighbours are in the map.
        size: the map's size.

    Example:
        >>> neighbours = find_neighbours(torch.tensor([[0, 1]]), (1, 4), radius=1)
        >>> find_rows(*neighbours, (1, 4))[:, 3:6].tolist()
        [[10, 12, 0], [8, 10, 12]]
    """
    pixels = batch_index(index, size)
    own = torch.arange(1, 1 + pixels.numel(), device=index.device, dtype=torch.int32)
    # Only what is written is read, so the table need not be initialised.
    table = own.new_empty(index.shape[1] * prod(size))
    table.scatter_reduce_(0, pixels.flatten(), own.where(inside.flatten(), 0), "amax", include_self=False)
    return torch.where(inside, table[pixels].long(), 0).flatten(1).mT.contiguous()


def padded_neighbours(cells: Annotated[Tensor, "B N"], size: Sequence[int]) -> Annotated[Tensor, "B*N K"]:
    """The pixels at most one away from each keypoint, in a batch of maps padded by one pixel on all sides.

    None of them is outside. Indices count the pixels of all maps one after the other.

    Args:
        cells: row-major indices in a map that is not padded.
        size: that map's size.

    Example:
        >>> padded_neighbours(torch.tensor([[0]]), (3, 4)).tolist()  # six pixels a row
        [[14, 13, 12, 8, 7, 6, 2, 1, 0]]
    """
    *others, width = size
    steps = torch.arange(2, -1, -1, device=cells.device)
    index, rest, stride = (cells % width)[..., None] + steps, cells // width, width + 2
    for length in reversed(others):
        near = (rest % length)[..., None] + steps
        index = torch.add(index[..., None, :], near[..., None], alpha=stride).flatten(-2)
        rest, stride = rest // length, stride * (length + 2)
    samples = torch.arange(cells.shape[0], device=cells.device)[:, None, None]
    return torch.add(index, samples, alpha=stride).flatten(0, 1)
