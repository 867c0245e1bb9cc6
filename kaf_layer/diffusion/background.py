"""A convolution of a map that holds the same values everywhere: constant too, but for the borders."""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Annotated, Any

import torch
from torch import Tensor

from kaf_layer.diffusion.rows import wide

__all__ = ["border_matrix", "fill", "fill_backward"]

SIDES: tuple[Any, ...] = (slice(None), slice(0, 1), slice(-1, None))  # of an axis: all pixels, the first, the last


def border_matrix(dims: int) -> Annotated[Tensor, "3^D 3^D"]:
    """What each side of a map lacks: sides by positions of the kernel, with the signs of inclusion and exclusion.

    Args:
        dims: D, the number of axes.

    Example:
        >>> border_matrix(1)  # all pixels see three positions, but the first and the last lack one each
        tensor([[ 1.,  1.,  1.],
                [-1.,  0.,  0.],
                [ 0.,  0., -1.]])
    """
    return reduce(torch.kron, [torch.tensor([[1.0, 1, 1], [-1, 0, 0], [0, 0, -1]])] * dims)


def fill(
    out: Annotated[Tensor, "B O *S"],
    values: Annotated[Tensor, "C"],
    weight: Annotated[Tensor, "O C *K"],
    bias: Annotated[Tensor, "O"],
    borders: Annotated[Tensor, "3^D 3^D"],
) -> None:
    """Writes the (zero-padded, 3x3 or 3x3x3) convolution of the map that holds ``values`` at each of its pixels."""
    dims = out.ndim - 2
    products = torch.einsum("ock,c->ok", weight.flatten(2).to(values.dtype), values)
    everywhere, *sides = (products @ borders.mT).view(-1, len(borders), *[1] * dims).unbind(1)
    # Expanded here, as torch 2.12 and older export what copy_ expands for one batch size only.
    out.copy_((everywhere + bias.view_as(everywhere)).expand_as(out))
    _, *places = product(SIDES, repeat=dims)
    for where, difference in zip(places, sides, strict=True):
        out[(..., *where)].add_(difference)


def fill_backward(
    grad: Annotated[Tensor, "B O *S"], borders: Annotated[Tensor, "3^D 3^D"]
) -> Annotated[Tensor, "O 3^D"]:
    """For each of the kernel's positions the gradient summed over the pixels whose neighbour there is in the map."""
    # Over all of a slice's pixels at once: a CPU can take 20 times as long to sum a map over some of its axes.
    pixels = (0, *range(2, grad.ndim))
    slices = (grad[(..., *where)] for where in product(SIDES, repeat=grad.ndim - 2))
    sums = torch.stack([pixels_of.sum(pixels, dtype=wide(grad)) for pixels_of in slices], dim=1)
    return sums @ borders
