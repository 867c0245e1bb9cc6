"""The Gaussian scale space of SIFT (Lowe 2004, section 3), with a blur that is a product of matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BORDER", "ScaleSpace", "blur", "double", "scale_space"]

BORDER = 5  # pixels of every octave along its edge in which OpenCV accepts no keypoint
BLOCK = 32  # output pixels per matrix product; fewer waste the window's margin, more multiply with zeros


@dataclass
class ScaleSpace:
    """All layers of all octaves of a batch, in one row per image so that one index reaches them all.

    Args:
        values: (B, T), octave after octave, ``layers + 3`` blurred images each, row-major.
        octaves: the same values, as a list of (B, H >> o, W >> o) for every octave o.
        layers: how many layers of each octave are searched for keypoints.
        sigma: the blur of the first layer of each octave, in that octave's pixels.
    """

    values: Annotated[Tensor, "B T"]
    octaves: list[list[Tensor]]
    layers: int
    sigma: float

    def take(self, index: Tensor) -> Tensor:
        """The values at ``index`` of the rows laid end to end, in its shape."""
        # Indexing with brackets does the same, eight times slower on CPUs.
        return self.values.flatten().index_select(0, index.flatten()).view_as(index)


def scale_space(images: Annotated[Tensor, "B H W"], *, layers: int, sigma: float, blurred: float) -> ScaleSpace:
    """Blurs images progressively, octave by octave, until an octave would have no pixel within its border.

    Args:
        images: the first octave's image.
        layers: layers per octave in which keypoints are searched.
        sigma: the blur of the first layer of each octave, in that octave's pixels.
        blurred: the blur that the images have already.
    """
    pyramid = _planes(images, layers, sigma, blurred)
    if images.requires_grad or torch.compiler.is_compiling():
        planes = list(pyramid)
        values = torch.cat([plane.flatten(1) for plane in planes], dim=1)
    else:
        # Half the memory, for which allocators are grateful; but its backward pass would be expensive.
        values, planes = _in_one_row(pyramid, images, layers)
    octaves = [planes[i : i + layers + 3] for i in range(0, len(planes), layers + 3)]
    return ScaleSpace(values, octaves, layers, sigma)


def _planes(
    images: Annotated[Tensor, "B H W"], layers: int, sigma: float, blurred: float
) -> Iterator[Annotated[Tensor, "B H W"]]:
    steps = [sigma * 2 ** (i / layers) * math.sqrt(1 - 2 ** (-2 / layers)) for i in range(1, layers + 3)]
    (first,) = blur(images, [math.sqrt(max(sigma**2 - blurred**2, 0.01))])
    while min(first.shape[1:]) > 2 * BORDER:
        yield first
        height, width = (size // 2 * 2 for size in first.shape[1:])
        for i, plane in enumerate(blur(first, steps), start=1):
            yield plane
            if i == layers:
                first = plane[:, :height:2, :width:2]


def _in_one_row(planes: Iterable[Tensor], images: Tensor, layers: int) -> tuple[Tensor, list[Tensor]]:
    height, width = images.shape[1:]
    octaves = (
        ((height >> o) * (width >> o)) for o in range(height.bit_length()) if min(height, width) >> o > 2 * BORDER
    )
    values = images.new_empty(len(images), (layers + 3) * sum(octaves))
    placed, start = [], 0
    for plane in planes:
        end = start + plane[0].numel()
        placed.append(values[:, start:end].view_as(plane).copy_(plane))
        start = end
    return values, placed


def double(images: Annotated[Tensor, "B H W"], upscale: Literal["precise", "opencv"]) -> Annotated[Tensor, "B 2H 2W"]:
    """Doubles the images' size by linear interpolation.

    Args:
        images: (B, H, W).
        upscale: ``"precise"`` puts pixel i at 2 i. ``"opencv"`` is the default of OpenCV's SIFT: it puts it at
            2 i + 0.5 and forgets the half, so that keypoints lie 0.25 pixels too far right and down.
    """
    for axis in (2, 1):
        size = images.shape[axis]
        following = torch.cat([images.narrow(axis, 1, size - 1), images.narrow(axis, size - 1, 1)], dim=axis)
        if upscale == "precise":
            pair = images, torch.lerp(images, following, 0.5)
        else:
            preceding = torch.cat([images.narrow(axis, 0, 1), images.narrow(axis, 0, size - 1)], dim=axis)
            pair = torch.lerp(images, preceding, 0.25), torch.lerp(images, following, 0.25)
        images = torch.stack(pair, dim=axis + 1).flatten(axis, axis + 1)
    return images


def blur(images: Annotated[Tensor, "B H W"], sigmas: Sequence[float]) -> Iterator[Annotated[Tensor, "B H W"]]:
    """Gaussian blurs of the images, each of the one before.

    As OpenCV does, the kernel is cut at 4 sigma and the image reflected about its outermost pixels.
    """
    height, width = images.shape[1:]
    rows = _convolution_blocks(height, sigmas, images)
    columns = rows if width == height else _convolution_blocks(width, sigmas, images)
    for row_blocks, column_blocks in zip(rows, columns, strict=True):
        images = _blur_and_swap(_blur_and_swap(images, column_blocks), row_blocks)
        yield images


def _blur_and_swap(
    images: Annotated[Tensor, "B H W"], matrix: Annotated[Tensor, "blocks BLOCK window"]
) -> Annotated[Tensor, "B W H"]:
    """Blurs along the last axis, and swaps the axes."""
    # Convolutions of one channel are an order of magnitude slower on CPUs than this product of
    # blocks of the (banded) convolution matrix with overlapping windows, which need no copy.
    size = images.shape[-1]
    blocks, block, window = matrix.shape
    radius = (window - block) // 2
    windows = F.pad(images, (radius, radius + blocks * block - size)).unfold(-1, window, block)
    return (matrix @ windows.permute(0, 2, 3, 1)).flatten(1, 2)[:, :size]


def _convolution_blocks(
    size: int, sigmas: Sequence[float], like: Tensor
) -> list[Annotated[Tensor, "blocks BLOCK window"]]:
    """For each blur, the weights that each pixel gives to the pixels of its block's window, reflection included."""
    radii = [(round(8 * sigma + 1) | 1) // 2 for sigma in sigmas]
    radius = max(radii)
    taps = torch.arange(-radius, radius + 1, device=like.device)
    kernels = torch.stack(
        [
            torch.exp(-0.5 * (taps.to(like.dtype) / s) ** 2) * (taps.abs() <= r)
            for s, r in zip(sigmas, radii, strict=True)
        ]
    )
    kernels = kernels / kernels.sum(1, keepdim=True)
    # Far from both ends all blocks are alike: compute one, and repeat it.
    margin = -(-radius // BLOCK)
    repeats = max(0, size // BLOCK - 1 - 2 * margin)
    size = size - repeats * BLOCK
    blocks = -(-size // BLOCK)
    pixels = torch.arange(blocks * BLOCK, device=like.device)[:, None]
    period = 2 * size - 2
    source = (pixels.clamp(max=size - 1) + taps) % period
    source = torch.minimum(source, period - source)
    column = source - pixels // BLOCK * BLOCK + radius
    shape = len(sigmas), len(pixels)
    matrix = like.new_zeros(*shape, BLOCK + 2 * radius)
    matrix = matrix.scatter_add_(2, column.expand(*shape, -1), kernels[:, None].expand(*shape, -1))
    matrix = matrix.unflatten(1, (blocks, BLOCK))
    repeated = matrix[:, margin : margin + 1].expand(-1, repeats, -1, -1)
    matrix = torch.cat([matrix[:, :margin], repeated, matrix[:, margin:]], dim=1)
    return [m[..., radius - r : matrix.shape[-1] - radius + r] for m, r in zip(matrix, radii, strict=True)]
