"""Two 3x3 convolutions of maps that are constant away from the keypoints, computed around the keypoints only.

The first convolution of a token changes K = 3^D pixels, both together 5^D, where D is the number of spatial axes.
Everywhere else the result is constant, except along the map's border. The neighbours of a keypoint are in the order of
the kernel's positions that reach them, from the last pixel to the first. Sizes are in tensor order, cells are row-major
indices, and all shapes follow from the inputs' shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "closest",
    "convolve_constant",
    "convolve_deviations",
    "convolve_tokens",
    "find_neighbours",
    "find_rows",
]


def find_neighbours(
    cells: Annotated[Tensor, "B N"], size: Sequence[int], *, radius: int
) -> tuple[Annotated[Tensor, "B N K"], Annotated[Tensor, "B N K"]]:
    """The cells up to ``radius`` away along each axis, and which of them are in the map.

    The index of a neighbour that is outside is that of some other cell.

    Example:
        >>> cells, inside = find_neighbours(torch.tensor([[4]]), (3, 4), radius=1)
        >>> torch.where(inside, cells, -1).flatten().tolist()
        [9, 8, -1, 5, 4, -1, 1, 0, -1]
    """
    side = 2 * radius + 1
    rest, way, near = cells[..., None], torch.arange(side ** len(size), device=cells.device), []
    for length in reversed(size[1:]):
        near.append(rest % length + (radius - way % side))
        rest, way = rest // length, way // side
    near = [rest + (radius - way), *reversed(near)]
    clamped = [x.clamp(0, length - 1) for x, length in zip(near, size, strict=True)]
    index, inside = clamped[0], near[0] == clamped[0]
    for x, in_map, length in zip(near[1:], clamped[1:], size[1:], strict=True):
        index, inside = torch.add(in_map, index, alpha=length), inside & (x == in_map)
    return index, inside


def closest(neighbours: Annotated[Tensor, "B N 5^D"], spatial_dims: int) -> Annotated[Tensor, "B N 3^D"]:
    """Of what ``find_neighbours`` gives for radius 2, what it gives for radius 1."""
    middle: Any = (..., *[slice(1, 4)] * spatial_dims)
    return torch.unflatten(neighbours, 2, [5] * spatial_dims)[middle].flatten(2)


def find_rows(
    index: Annotated[Tensor, "B N K"], inside: Annotated[Tensor, "B N K"], size: Sequence[int]
) -> Annotated[Tensor, "B N K"]:
    """The row that represents each pixel that the first convolution reaches, from neighbours one away.

    Every neighbour of every keypoint has a row. Where several keypoints reach a pixel, one of their rows represents it,
    on a CPU the last, and the others stay empty. One more row, the last, collects what falls outside the map.

    Example:
        >>> neighbours = find_neighbours(torch.tensor([[0, 1]]), (1, 4), radius=1)
        >>> find_rows(*neighbours, (1, 4))[0, :, 3:6].tolist()
        [[13, 14, 18], [12, 13, 14]]
    """
    samples, total = torch.arange(index.shape[0], device=index.device)[:, None, None], index.shape[0] * prod(size)
    pixels = torch.add(index, samples, alpha=prod(size))
    # int32, since the table has an entry for each pixel of the batch and is read at random.
    rows = torch.arange(pixels.numel(), device=index.device, dtype=torch.int32)
    # Only entries that were written are read, so the table of all pixels needs no initialisation.
    table = rows.new_empty(total + 1).scatter_(0, pixels.where(inside, total).flatten(), rows)
    return table[pixels].long().where(inside, pixels.numel())


def convolve_tokens(
    tokens: Annotated[Tensor, "B N C"],
    weight: Annotated[Tensor, "O C *K"],
    places: Annotated[Tensor, "B N K"],
    start: Annotated[Tensor, "P O"],
) -> Annotated[Tensor, "P O"]:
    """The first convolution: one matrix product, whose K parts for each token are added to ``start`` at its places."""
    matrix = weight.flatten(2).permute(2, 0, 1).flatten(0, 1)
    products = F.linear(tokens, matrix).view(places.numel(), weight.shape[0])
    index = places.view(-1, 1).expand_as(products)  # unlike index_add, scatter_add keeps nothing but the index
    return start.scatter_add(0, index, products.to(start.dtype))


def convolve_deviations(
    deviations: Annotated[Tensor, "B N K C"], weight: Annotated[Tensor, "O C *K"]
) -> Annotated[Tensor, "B N O 5^D"]:
    """The second convolution, without bias, of the neighbourhood of each keypoint.

    In the order of the neighbours, it is a product of polynomials, that is a transposed convolution.
    """
    convolve = F.conv_transpose2d if weight.ndim == 4 else F.conv_transpose3d
    weight = weight.transpose(0, 1).contiguous()  # before autocast converts it, which torch.compile fuses
    patches = convolve(torch.unflatten(deviations.flatten(0, 1).mT, 2, weight.shape[2:]), weight)
    return torch.unflatten(patches.flatten(2), 0, deviations.shape[:2])


def convolve_constant(
    values: Annotated[Tensor, "C"],
    weight: Annotated[Tensor, "O C *K"],
    bias: Annotated[Tensor, "O"] | None,
    size: Sequence[int],
) -> tuple[Annotated[Tensor, "O"], Annotated[Tensor, "L"], Annotated[Tensor, "O L"]]:
    """The second convolution of a map that holds the same values in all pixels.

    Three pixels along each axis show all cases: the first pixel, those in between, and the last.

    Returns:
        The result away from the borders; the cells along the borders, where those in corners occur once for each axis;
        and what to add to the result there.

    Example:
        >>> constant, border, differences = convolve_constant(torch.ones(1), torch.ones(1, 1, 3, 3), None, (3, 4))
        >>> constant.expand(12).scatter_add(0, border, differences[0]).view(3, 4)
        tensor([[4., 6., 6., 4.],
                [6., 9., 9., 6.],
                [4., 6., 6., 4.]])
    """
    shown = [1 if length == 1 else 3 for length in size]  # a map of 2 has both ends of 3 and no middle
    convolve = F.conv2d if weight.ndim == 4 else F.conv3d
    kinds = convolve(values.view(1, -1, *[1] * len(size)).expand(-1, -1, *shown), weight, bias, padding=1)[0].flatten(1)
    middle = kinds.shape[1] // 2
    constant = kinds[:, middle]
    # In a corner a kind occurs once for each axis, and each time has a part of the difference.
    at_end = torch.arange(-1, 2, device=values.device).abs()
    ends = [at_end.view(-1, *[1] * axis) for axis in range(sum(length != 1 for length in size))]
    parts = (kinds - constant[:, None]) / sum(ends[1:], ends[0]).clamp(min=1).flatten() if ends else kinds
    pixels, sides = torch.arange(prod(size), device=values.device).view(*size), []
    kind, stride = torch.full_like(pixels, middle), 1  # of each pixel
    for axis, length in reversed(list(enumerate(size))):
        if length != 1:
            for end, step in ((0, -stride), (length - 1, stride)):
                sides.append(pixels.narrow(axis, end, 1).flatten())
                kind.narrow(axis, end, 1).add_(step)
            stride *= 3
    border = torch.cat(sides or [pixels.flatten()[:0]])
    return constant, border, parts[:, kind.flatten()[border]]
