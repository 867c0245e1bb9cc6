"""The Gaussian scale space of SIFT (Lowe 2004, section 3), with a blur that is a product of matrices."""

from __future__ import annotations

import math
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


def scale_space(images: Annotated[Tensor, "B H W"], *, layers: int, sigma: float, blurred: float) -> ScaleSpace:
    """Blurs images progressively, octave by octave, until an octave would have no pixel within its border.

    Args:
        images: the first octave's image.
        layers: layers per octave in which keypoints are searched.
        sigma: the blur of the first layer of each octave, in that octave's pixels.
        blurred: the blur that the images have already.
    """
    steps = [sigma * 2 ** (i / layers) * math.sqrt(1 - 2 ** (-2 / layers)) for i in range(1, layers + 3)]
    layer = blur(images, math.sqrt(max(sigma**2 - blurred**2, 0.01)))
    octaves = []
    while min(layer.shape[1:]) > 2 * BORDER:
        octave = [layer]
        for step in steps:
            octave.append(blur(octave[-1], step))
        octaves.append(octave)
        height, width = (size // 2 * 2 for size in layer.shape[1:])
        layer = octave[layers][:, :height:2, :width:2]
    values = torch.cat([layer.flatten(1) for octave in octaves for layer in octave], dim=1)
    return ScaleSpace(values, octaves, layers, sigma)


def double(images: Annotated[Tensor, "B H W"], upscale: Literal["precise", "opencv"]) -> Annotated[Tensor, "B 2H 2W"]:
    """Doubles the images' size by linear interpolation.

    Args:
        images: (B, H, W).
        upscale: ``"precise"`` puts pixel i at 2 i. ``"opencv"`` is the default of OpenCV's SIFT: it puts it at
            2 i + 0.5 and forgets the half, so that keypoints lie 0.25 pixels too far right and down.
    """
    for _ in range(2):  # along the last axis, and swap
        following = torch.cat([images[..., 1:], images[..., -1:]], dim=-1)
        preceding = torch.cat([images[..., :1], images[..., :-1]], dim=-1)
        if upscale == "precise":
            pair = images, (images + following) / 2
        else:
            pair = 0.75 * images + 0.25 * preceding, 0.75 * images + 0.25 * following
        images = torch.stack(pair, dim=-1).flatten(-2).mT
    return images


def blur(images: Annotated[Tensor, "B H W"], sigma: float) -> Annotated[Tensor, "B H W"]:
    """Gaussian blur, the kernel cut at 4 sigma as OpenCV does, the image reflected about its outermost pixels."""
    radius = (round(8 * sigma + 1) | 1) // 2
    for _ in range(2):  # along the last axis, and swap
        images = _blur_and_swap(images, sigma, radius)
    return images


def _blur_and_swap(images: Annotated[Tensor, "B H W"], sigma: float, radius: int) -> Annotated[Tensor, "B W H"]:
    # Convolutions of one channel are an order of magnitude slower on CPUs than this product of
    # blocks of the (banded) convolution matrix with overlapping windows, which need no copy.
    size = images.shape[-1]
    matrix = _convolution_blocks(size, sigma, radius, images)
    blocks, block, window = matrix.shape
    padded = F.pad(images, (radius, radius + blocks * block - size))
    windows = padded.unfold(-1, window, block)
    return (matrix @ windows.permute(0, 2, 3, 1)).flatten(1, 2)[:, :size]


def _convolution_blocks(size: int, sigma: float, radius: int, like: Tensor) -> Annotated[Tensor, "blocks BLOCK window"]:
    """Which weights each output pixel gives to the pixels of its block's window, reflection included."""
    taps = torch.arange(-radius, radius + 1, device=like.device)
    kernel = torch.exp(-0.5 * (taps.to(like.dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    blocks = -(-size // BLOCK)
    pixels = torch.arange(blocks * BLOCK, device=like.device)[:, None]
    period = 2 * size - 2
    source = (pixels.clamp(max=size - 1) + taps) % period
    source = torch.minimum(source, period - source)
    column = source - pixels // BLOCK * BLOCK + radius
    matrix = like.new_zeros(len(pixels), BLOCK + 2 * radius)
    return matrix.scatter_add_(1, column, kernel.expand(len(pixels), -1)).unflatten(0, (blocks, BLOCK))
