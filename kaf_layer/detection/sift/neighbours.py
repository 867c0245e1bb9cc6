"""Which pixels of the differences of Gaussians are extrema among their neighbours (Lowe 2004, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

__all__ = ["extremal_strength", "is_extremum"]

Reduce = Callable[[Tensor, Tensor], Tensor]


def is_extremum(
    gaussians: Annotated[Tensor, "B layers+3 *S"], threshold: float, border: int
) -> Annotated[Tensor, "B layers *inner"]:
    """Whether each pixel within the border is an extremum, for each layer that lies between two others.

    Args:
        gaussians: the blurred images of the octave: three more than layers that are searched.
        threshold: the least magnitude, in units of the image.
        border: the number of pixels along each edge that are not searched, at least 1.
    """
    inner, near = _differences(gaussians, border)
    neighbours = _cross if inner.ndim == 5 else _box
    is_maximum = (inner > threshold) & (inner >= neighbours(torch.maximum, near))
    is_minimum = (inner < -threshold) & (inner <= neighbours(torch.minimum, near))
    return is_maximum | is_minimum


def extremal_strength(
    gaussians: Annotated[Tensor, "B layers+3 *S"], border: int
) -> Annotated[Tensor, "B layers *inner"]:
    """The magnitude of the difference where it is an extremum, else at most 0; fewer bytes, but slow on a CPU."""
    inner, near = _differences(gaussians, border)
    neighbours = _cross if inner.ndim == 5 else _box_at_once
    is_maximum, is_minimum = (neighbours(reduce, near) == inner for reduce in (torch.maximum, torch.minimum))
    # 1 for a maximum and -1 for a minimum, in bytes. It comes first, as the result gets the first operand's layout.
    return (is_maximum.view(torch.int8) - is_minimum.view(torch.int8)) * inner


def _differences(gaussians: Annotated[Tensor, "B layers+3 *S"], border: int) -> tuple[Tensor, Tensor]:
    """The differences of the searched pixels, and those with all neighbours."""
    differences = gaussians[:, 1:] - gaussians[:, :-1]
    return _within(differences[:, 1:-1], border), _within(differences, border - 1)


def _within(images: Annotated[Tensor, "B layers *S"], border: int) -> Tensor:
    every = slice(None)
    return images[(every, every, *(slice(border, size - border) for size in images.shape[2:]))]


def _box(reduce: Reduce, layers: Tensor) -> Tensor:
    """The largest or smallest value in the neighbourhood, 3 wide along every axis, of each pixel but the outermost."""
    value = layers
    for axis in range(1, value.ndim):
        value = _three(reduce, value, axis)
    return value


def _box_at_once(reduce: Reduce, layers: Tensor) -> Tensor:
    for axis in range(1, layers.ndim):
        layers = layers.unfold(axis, 3, 1)
    window = (-3, -2, -1)
    return layers.amax(window) if reduce is torch.maximum else layers.amin(window)


def _cross(reduce: Reduce, layers: Tensor) -> Tensor:
    """The same among a pixel, the two along every axis, and the same pixel of the layers below and above.

    Volumes have three times as many of these extrema as of extrema in the whole neighbourhood, and more of them are
    found again after a rotation.
    """
    below, centre, above = layers[:, :-2], layers[:, 1:-1], layers[:, 2:]
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
