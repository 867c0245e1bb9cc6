"""The Gaussian scale space of SIFT (Lowe 2004, section 3), with blurring by matrix products.

It serves images and volumes. Voxels need not be cubes: every axis is blurred in proportion, and an axis that is coarser
than the others is halved only when they have become as coarse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from kaf_layer.detection.sift.blur import Kernels, blur, gaussian_kernels
from kaf_layer.detection.sift.quadratic import central_differences
from kaf_layer.detection.sift.sheets import sheets

__all__ = ["Octave", "ScaleSpace", "double", "scale_space"]

BORDER = 5  # pixels along the edge of every octave in which OpenCV accepts no keypoint
FINE = math.sqrt(2)  # an axis whose pixels are less than this factor coarser than the finest is doubled with it


class Octave(NamedTuple):
    """The pixels of an octave, in tensor order.

    Args:
        size: the size of its images.
        stride: pixels of the first octave between its pixels.
        pitch: the distance between its pixels, relative to the finest axis.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    pitch: tuple[float, ...]

    def halved(self) -> tuple[bool, ...]:
        """Which axes the next octave has half as many pixels along."""
        return tuple(pitch < FINE for pitch in self.pitch)


@dataclass
class ScaleSpace:
    """All layers of all octaves of a batch, in one block of memory, so that one index reaches them all.

    Args:
        values: the memory, which may also hold values that belong to no layer.
        octaves: its ``layers + 3`` blurred images for each octave, views of the memory.
        starts: where each of these views starts; compilers cannot ask them.
        grids: the pixels of every octave; for cubic pixels the size is halved each time.
        layers: how many layers of each octave are searched for keypoints.
        sigma: the blur of the first layer of each octave, in that octave's pixels (the finest axis').
        border: how many pixels along the edge of every octave hold no keypoint.
        derivatives: what turns the differences around a pixel into their derivatives.
    """

    values: Annotated[Tensor, "..."]
    octaves: list[Annotated[Tensor, "B layers+3 *S"]]
    starts: list[int]
    grids: list[Octave]
    layers: int
    sigma: float
    border: int
    derivatives: Annotated[Tensor, "3**(1+D) columns"] = field(init=False)

    def __post_init__(self) -> None:
        self.derivatives = central_differences(1 + len(self.grids[0].size), self.values)

    def tables(self) -> tuple[Tensor, ...]:
        """For each octave its start, the step between images, and the step, size, stride and pitch of ``Extrema``."""
        axes = len(self.grids[0].size)
        octaves = zip(self.starts, self.octaves, self.grids, strict=True)
        rows = [(start, *octave.stride(), *grid.size, *grid.stride) for start, octave, grid in octaves]
        integers = _stack(rows, torch.long, self.values).split([1, 1, 1 + axes, axes, axes], dim=1)
        return *integers, _stack([grid.pitch for grid in self.grids], self.values.dtype, self.values)

    def take(self, index: Tensor) -> Tensor:
        """The values at ``index`` of the memory, in its shape."""
        # Indexing with brackets does the same, eight times slower on CPUs.
        return self.values.flatten().index_select(0, index.flatten()).view_as(index)


def scale_space(
    images: Annotated[Tensor, "B *S"],
    *,
    layers: int,
    sigma: float,
    blurred: float | Sequence[float],
    pitch: Sequence[float] | None = None,
    border: int = BORDER,
) -> ScaleSpace:
    """Blurs images progressively, octave by octave, until an octave would have no pixel within its border.

    Args:
        images: the first octave's images.
        layers: layers per octave in which keypoints are searched.
        sigma: the blur of the first layer of each octave, in that octave's pixels (the finest axis').
        blurred: the blur that the images have already, in pixels of each axis.
        pitch: the distance between pixels along each axis, relative to the finest; 1 if None.
        border: how many pixels along the edge of every octave hold no keypoint.
    """
    size = tuple(images.shape[1:])
    blurred = (blurred,) * len(size) if isinstance(blurred, (int, float)) else tuple(blurred)
    grids = _octaves(Octave(size, (1,) * len(size), (1.0,) * len(size) if pitch is None else tuple(pitch)), border)
    kernels = _kernels(images, grids, layers, sigma, blurred)
    if images.requires_grad or torch.compiler.is_compiling():
        planes = _planes(images, grids, layers, kernels, [blur] * len(grids))
        values = torch.cat([plane.flatten(1) for plane in planes], dim=1)
        octaves, starts = _octaves_in_rows(values, grids, layers)
    elif len(size) == 3:
        # Half the memory, for which allocators are grateful; but its backward pass would be expensive.
        values = images.new_empty(images.shape[0], (layers + 3) * sum(math.prod(grid.size) for grid in grids))
        octaves, starts = _octaves_in_rows(values, grids, layers)
        places = chain.from_iterable(octave.unbind(1) for octave in octaves)
        for place, plane in zip(places, _planes(images, grids, layers, kernels, [blur] * len(grids)), strict=True):
            place.copy_(plane)
    else:
        values, parts = sheets(images, [grid.size for grid in grids], layers + 3, kernels[0])
        octaves = [sheet.octave() for sheet in parts]
        starts = [int(octave.storage_offset()) for octave in octaves]
        for _ in _planes(images, grids, layers, kernels, [sheet.blur for sheet in parts]):
            pass  # each is in its place already
    return ScaleSpace(values, octaves, starts, grids, layers, sigma, border)


def _octaves_in_rows(
    values: Annotated[Tensor, "B T"], grids: Sequence[Octave], layers: int
) -> tuple[list[Annotated[Tensor, "B layers+3 *S"]], list[int]]:
    """Views of the octaves, which lie one after the other in each image's row, and where they start."""
    lengths = [(layers + 3) * math.prod(grid.size) for grid in grids]
    parts = zip(values.split(lengths, dim=1), grids, strict=True)
    return [torch.unflatten(part, 1, (-1, *grid.size)) for part, grid in parts], [0, *accumulate(lengths[:-1])]


def _stack(rows: Sequence[Sequence[float]], dtype: torch.dtype, like: Tensor) -> Annotated[Tensor, "rows columns"]:
    """A matrix of Python's numbers. A single tensor of them would be a synchronising copy on CUDA."""
    numbers = {number: like.new_full((), number, dtype=dtype) for number in {number for row in rows for number in row}}
    return torch.unflatten(torch.stack([numbers[number] for row in rows for number in row]), 0, (len(rows), -1))


def _octaves(grid: Octave, border: int) -> list[Octave]:
    grids = []
    while min(grid.size) > 2 * border:
        grids.append(grid)
        steps = [2 if halved else 1 for halved in grid.halved()]
        grid = Octave(
            tuple(size // step for size, step in zip(grid.size, steps, strict=True)),
            tuple(stride * step for stride, step in zip(grid.stride, steps, strict=True)),
            tuple(pitch * step / 2 for pitch, step in zip(grid.pitch, steps, strict=True)),
        )
    return grids


def _kernels(
    images: Annotated[Tensor, "B *S"], grids: Sequence[Octave], layers: int, sigma: float, blurred: tuple[float, ...]
) -> list[list[Kernels]]:
    """For each octave and axis the blur that the first octave's images miss, and those of the layers."""
    steps = [sigma * 2 ** (i / layers) * math.sqrt(1 - 2 ** (-2 / layers)) for i in range(1, layers + 3)]

    def along(pitch: float, before: float) -> Kernels:
        # Along a coarse axis the blur that the image has already, and blurs much narrower than a pixel, are neglected.
        missing = math.sqrt(max((sigma / pitch) ** 2 - before**2, 0.01))
        return gaussian_kernels([missing, *(step / pitch for step in steps)], images)

    axes = [tuple(zip(grid.pitch, blurred, strict=True)) for grid in grids]
    known = {axis: along(*axis) for axis in {axis for octave in axes for axis in octave}}
    for axis, kernel in known.items():
        octaves = zip(grids, axes, strict=True)
        kernel.prepare(
            n for grid, octave in octaves for n, other in zip(grid.size, octave, strict=True) if other == axis
        )
    return [[known[axis] for axis in octave] for octave in axes]


def _planes(
    images: Annotated[Tensor, "B *S"],
    grids: Sequence[Octave],
    layers: int,
    kernels: Sequence[Sequence[Kernels]],
    blurs: Sequence[Callable[..., Iterator[Tensor]]],
) -> Iterator[Annotated[Tensor, "B *S"]]:
    """The planes of all octaves, computed by the function in ``blurs`` of each."""
    following, is_first = images, True
    for grid, along, blur_octave in zip(grids, kernels, blurs, strict=True):
        for i, plane in enumerate(blur_octave(following, along, first=is_first)):
            yield plane
            if i == layers:
                following = _halve(plane, grid.halved())
        is_first = False


def _halve(images: Annotated[Tensor, "B *S"], halved: Sequence[bool]) -> Annotated[Tensor, "B *half"]:
    """Every second pixel along these axes, without the last of an odd number."""
    sizes = zip(images.shape[1:], halved, strict=True)
    return images[(slice(None), *(slice(0, size // 2 * 2, 2) if half else slice(None) for size, half in sizes))]


def double(
    images: Annotated[Tensor, "B *S"], upscale: Literal["precise", "opencv"], *, axes: Sequence[bool] | None = None
) -> Annotated[Tensor, "B *2S"]:
    """Doubles the images' size by linear interpolation.

    Args:
        images: (B, *S).
        upscale: ``"precise"`` puts pixel i at 2 i. ``"opencv"`` is the default of OpenCV's SIFT: it puts it at
            2 i + 0.5 and ignores the half, so that keypoints lie 0.25 pixels too far right and down.
        axes: which of the spatial axes; all if None.
    """
    axes = (True,) * (images.ndim - 1) if axes is None else axes
    for axis in (axis for axis in range(images.ndim - 1, 0, -1) if axes[axis - 1]):
        size = images.shape[axis]
        following = torch.cat([images.narrow(axis, 1, size - 1), images.narrow(axis, size - 1, 1)], dim=axis)
        if upscale == "precise":
            pair = images, torch.lerp(images, following, 0.5)
        else:
            preceding = torch.cat([images.narrow(axis, 0, 1), images.narrow(axis, 0, size - 1)], dim=axis)
            pair = torch.lerp(images, preceding, 0.25), torch.lerp(images, following, 0.25)
        images = torch.stack(pair, dim=axis + 1).flatten(axis, axis + 1)
    return images
