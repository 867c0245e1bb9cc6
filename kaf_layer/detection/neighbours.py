"""Which pixels of the differences of Gaussians are extrema among their neighbours (Lowe 2004, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

__all__ = ["is_extremum"]

Reduce = Callable[[Tensor, Tensor], Tensor]


def is_extremum(
    gaussians: Annotated[Tensor, "B layers+3 *S"], threshold: float, border: int
) -> Annotated[Tensor, "B layers *S"]:
    """For each layer of an octave between two others, and each pixel within the border.

    Args:
        gaussians: the blurred images of the octave: three more than layers that are searched.
        threshold: the least magnitude, in units of the image.
        border: of pixels that are not looked at, at least 1.
    """
    differences = gaussians[:, 1:] - gaussians[:, :-1]
    neighbours = _box if gaussians.ndim == 4 else _cross
    inner = _within(differences[:, 1:-1], border)
    near = _within(differences, border - 1)
    layers = near[:, :-2], near[:, 1:-1], near[:, 2:]
    is_maximum = (inner > threshold) & (inner >= neighbours(torch.maximum, *layers))
    is_minimum = (inner < -threshold) & (inner <= neighbours(torch.minimum, *layers))
    return is_maximum | is_minimum


def _within(images: Annotated[Tensor, "B layers *S"], border: int) -> Tensor:
    every = slice(None)
    return images[(every, every, *(slice(border, size - border) for size in images.shape[2:]))]


def _box(reduce: Reduce, below: Tensor, centre: Tensor, above: Tensor) -> Tensor:
    """The largest or smallest value in the neighbourhood, 3 wide along every axis, of each pixel but the outermost."""
    value = reduce(reduce(below, centre), above)
    for axis in range(2, value.ndim):
        value = _three(reduce, value, axis)
    return value


def _cross(reduce: Reduce, below: Tensor, centre: Tensor, above: Tensor) -> Tensor:
    """The same among a pixel, the two along every axis, and the same pixel of the layers below and above.

    Volumes have three times as many of these extrema as of the whole neighbourhood's, and more of them are found again
    once the volume is turned.
    """
    value = reduce(_within(below, 1), _within(above, 1))
    for axis in range(2, centre.ndim):
        line = _three(reduce, centre, axis)
        for other in range(2, centre.ndim):
            line = line if other == axis else line.narrow(other, 1, line.shape[other] - 2)
        value = reduce(value, line)
    return value


def _three(reduce: Reduce, values: Tensor, axis: int) -> Tensor:
    inner = values.shape[axis] - 2
    left, middle, right = (values.narrow(axis, step, inner) for step in range(3))
    return reduce(reduce(left, middle), right)
