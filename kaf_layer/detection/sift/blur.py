"""Gaussian blur along every axis by matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Kernels", "blur", "gaussian_kernels"]

BLOCK = 32  # output pixels per matrix product; fewer waste the window's margin, more multiply with zeros


@dataclass
class Kernels:
    """Gaussian kernels for several blurs, which end at ``radii`` pixels from their centre."""

    weights: Annotated[Tensor, "blurs taps"]
    radii: tuple[int, ...]
    _matrices: dict[int, Annotated[Tensor, "blurs blocks BLOCK window"]] = field(default_factory=dict)

    def blocks(self, size: int, repeats: int = 1) -> list[Annotated[Tensor, "repeats*blocks BLOCK window"]]:
        """For each blur of so many pixels, the weights that each gives to those of its block's window; repeated."""
        radius, matrix = max(self.radii), self._matrix(size)
        if repeats > 1:
            matrix = matrix.repeat(1, repeats, 1, 1)
        return [m[..., radius - r : matrix.shape[-1] - radius + r] for m, r in zip(matrix, self.radii, strict=True)]

    def prepare(self, sizes: Iterable[int]) -> None:
        """Computes the matrices for images of several sizes at once, which takes few kernels."""
        reduced = sorted({size - BLOCK * self._repeats(size) for size in sizes} - self._matrices.keys())
        if reduced:
            counts = [-(-size // BLOCK) for size in reduced]
            matrices = _convolution_blocks(reduced, counts, self.weights, max(self.radii)).split(counts, dim=1)
            self._matrices.update(zip(reduced, matrices, strict=True))

    def _repeats(self, size: int) -> int:
        """Far from both ends all blocks are alike: how many more there are than have to be computed."""
        return max(0, size // BLOCK - 1 - 2 * self._margin())

    def _margin(self) -> int:
        return -(-max(self.radii) // BLOCK)

    def _matrix(self, size: int) -> Annotated[Tensor, "blurs blocks BLOCK window"]:
        if size not in self._matrices:
            self.prepare([size])
            margin, repeats = self._margin(), self._repeats(size)
            if repeats:
                matrix = self._matrices[size - BLOCK * repeats]
                repeated = matrix[:, margin : margin + 1].expand(-1, repeats, -1, -1)
                self._matrices[size] = torch.cat([matrix[:, :margin], repeated, matrix[:, margin:]], dim=1)
        return self._matrices[size]


def gaussian_kernels(sigmas: Sequence[float], like: Tensor) -> Kernels:
    """Sampled Gaussians, cut at 4 sigma as in OpenCV.

    Args:
        sigmas: in pixels.
        like: a tensor with the type and the device of the kernels.
    """
    radii = tuple((round(8 * sigma + 1) | 1) // 2 for sigma in sigmas)
    taps = torch.arange(-max(radii), max(radii) + 1, device=like.device)
    distances, scaled = taps.abs(), taps.to(like.dtype)
    inside = torch.stack([distances <= radius for radius in radii])
    weights = torch.exp(torch.stack([scaled / sigma for sigma in sigmas]).square() * -0.5) * inside
    return Kernels(weights / weights.sum(1, keepdim=True), radii)


def blur(
    images: Annotated[Tensor, "B *S"], kernels: Sequence[Kernels], *, first: bool = True
) -> Iterator[Annotated[Tensor, "B *S"]]:
    """Blurs of the images, each of the one before; they are reflected about their outermost pixels, as in OpenCV.

    Args:
        images: (B, *S).
        kernels: for each axis those of all blurs.
        first: whether to do the first blur; otherwise the images are taken to have it.
    """
    axes = [kernel.blocks(size) for size, kernel in zip(images.shape[1:], kernels, strict=True)]
    for i, matrices in enumerate(zip(*axes, strict=True)):
        if first or i:
            images = _blur(images, matrices)
        yield images


def _blur(
    images: Annotated[Tensor, "B *S"], matrices: Sequence[Annotated[Tensor, "blocks_i BLOCK window_i"]]
) -> Annotated[Tensor, "B *S"]:
    # Convolutions of one channel are an order of magnitude slower on CPUs than this product of blocks of the (banded)
    # convolution matrix with overlapping windows, which are a view: each product takes lines along the last axis, and
    # makes it the first. So the images' axis, the first, is the last at the end.
    margins = [
        (radius, radius + blocks * block - size)
        for size, (blocks, block, window) in zip(images.shape[1:], (m.shape for m in matrices), strict=True)
        for radius in [(window - block) // 2]
    ]
    at_once = len(margins) == 2  # slices of a volume may be fewer than a margin
    values = F.pad(images, [*margins[1], *margins[0]]) if at_once else images
    for size, margin, matrix in reversed(list(zip(images.shape[1:], margins, matrices, strict=True))):
        values = values if at_once else F.pad(values, margin)
        windows = values.flatten(0, -2).unfold(-1, matrix.shape[2], matrix.shape[1])
        blurred = torch.bmm(matrix, windows.permute(1, 2, 0)).flatten(0, 1)
        values = torch.unflatten(blurred[:size], 1, values.shape[:-1])
    return values.movedim(-1, 0)


def _convolution_blocks(
    sizes: Sequence[int], counts: Sequence[int], weights: Annotated[Tensor, "blurs taps"], radius: int
) -> Annotated[Tensor, "blurs blocks BLOCK window"]:
    """The weights of convolutions of so many pixels, reflection included; one size's blocks after the other's."""
    device = weights.device
    # Each block's first pixel, and the last of its image.
    start = torch.cat([torch.arange(0, count * BLOCK, BLOCK, device=device) for count in counts]).view(-1, 1, 1)
    last = torch.cat([start.new_full((n,), size - 1) for n, size in zip(counts, sizes, strict=True)]).view(-1, 1, 1)
    pixels = torch.minimum(start + torch.arange(BLOCK, device=device)[:, None], last)
    source = (pixels + torch.arange(-radius, radius + 1, device=device)) % (2 * last)
    source = torch.minimum(source, 2 * last - source)
    column = (source - (start - radius)).expand(weights.shape[0], -1, -1, -1)
    matrix = weights.new_zeros(*column.shape[:3], BLOCK + 2 * radius)
    return matrix.scatter_add_(3, column, weights[:, None, None].expand_as(column))
