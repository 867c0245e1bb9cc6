"""A convolution of a map that holds the same values everywhere: constant too, but for the borders."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any

import torch
from torch import Tensor

__all__ = ["fill", "fill_backward"]


def _sides(dims: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The whole map, its borders and corners, as slices and with their signs in the inclusion-exclusion formula.

    The slices select, of the map, the pixels that lack neighbours, and of the kernel, the positions of these.
    """
    whole, first, last = slice(None), slice(0, 1), slice(-1, None)
    for sides in product((whole, first, last), repeat=dims):
        yield (-1) ** (dims - sides.count(whole)), sides


def fill(
    out: Annotated[Tensor, "B O *S"],
    values: Annotated[Tensor, "C"],
    weight: Annotated[Tensor, "O C *K"],
    bias: Annotated[Tensor, "O"],
) -> None:
    """Writes the (zero-padded, 3x3 or 3x3x3) convolution of the map that holds ``values`` at each of its pixels."""
    products = torch.einsum("oc...,c->o...", weight.to(values.dtype), values)
    for sign, sides in _sides(out.ndim - 2):
        total = products[..., *sides].flatten(1).sum(1).view(-1, *[1] * len(sides))
        if sides.count(slice(None)) == len(sides):
            out.copy_(total + bias.view_as(total))
        else:
            out[..., *sides] += sign * total


def fill_backward(grad: Annotated[Tensor, "B O *S"]) -> Annotated[Tensor, "O 3*"]:
    """For each of the kernel's positions the gradient summed over the pixels whose neighbour there is in the map."""
    dims, dtype = grad.ndim - 2, torch.promote_types(grad.dtype, torch.float32)
    sums = torch.zeros(grad.shape[1], *[3] * dims, dtype=dtype, device=grad.device)
    for sign, sides in _sides(dims):
        total = grad[..., *sides].sum((0, *range(2, grad.ndim)), dtype=dtype)
        sums[..., *sides] += sign * total.view(-1, *[1] * dims)
    return sums
