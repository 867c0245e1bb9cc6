"""Gaussian blur in place: matrix products read images from the memory of the scale space and write to it.

Nothing is padded or copied on the way, as it is in ``blur``. Autograd and compilers do not allow it, and for volumes of
few slices it would take several times the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from kaf_layer.detection.sift.blur import BLOCK, Kernels

__all__ = ["Sheet", "sheets"]


class Sheet(NamedTuple):
    """The memory of an octave. In each plane the images lie one below the other, in whole blocks of rows and columns.

    At the edges the window of a block reaches into other rows, images or planes. Their values get zero weight, but must
    be finite. So there is a margin of zeros before each plane, and one at either end of the scratch memory.

    Args:
        memory: the margin and the pixels of each plane.
        scratch: room for the pixels of a plane between two margins.
        images: B.
        size: (height, width) of each image.
    """

    memory: Annotated[Tensor, "planes margin+pixels"]
    scratch: Annotated[Tensor, "margin+pixels+margin"]
    images: int
    size: tuple[int, ...]

    @property
    def margin(self) -> int:
        """The number of values before the pixels of each plane."""
        return self.memory.shape[1] - self.images * math.prod(_whole(self.size))

    def octave(self) -> Annotated[Tensor, "B planes H W"]:
        """The images, as a view."""
        height, width = self.size
        whole = torch.unflatten(self.memory[:, self.margin :], 1, (self.images, *_whole(self.size)))
        return whole[..., :height, :width].transpose(0, 1)

    def blur(
        self, images: Annotated[Tensor, "B H W"], kernels: Sequence[Kernels], *, first: bool = True
    ) -> Iterator[Annotated[Tensor, "B H W"]]:
        """Fills the planes with the blurs of the images, and returns each as a view; with the arguments of ``blur``."""
        along_y, along_x = kernels
        planes = self.octave().unbind(1)
        (self.memory[:, : self.margin] if _whole(self.size) == self.size else self.memory).zero_()
        planes[0].copy_(images)
        matrices = zip(along_y.blocks(self.size[0], self.images), along_x.blocks(self.size[1]), strict=True)
        for i, (plane, (y, x)) in enumerate(zip(planes, matrices, strict=True)):
            if first or i:
                self._blur(max(i - 1, 0), i, y, x)
            yield plane

    def _blur(
        self,
        source: int,
        target: int,
        y: Annotated[Tensor, "B*down BLOCK window_y"],
        x: Annotated[Tensor, "across BLOCK window_x"],
    ) -> None:
        across, columns = len(x), len(x) * BLOCK
        pixels = self.memory[target, self.margin :]
        start = source * self.memory.shape[1] + self.margin
        lines = torch.unflatten(_windows(self.memory.flatten(), start, len(pixels), x, 1), 0, (-1, across))
        start = (len(self.scratch) - len(pixels)) // 2
        blurred = self.scratch[start : start + len(pixels)]
        torch.bmm(lines.transpose(0, 1), x.mT, out=blurred.view(-1, across, BLOCK).transpose(0, 1))
        lines = torch.unflatten(_windows(self.scratch, start, len(pixels), y, columns), 1, (-1, columns))
        torch.bmm(y, lines, out=pixels.view(-1, BLOCK, columns))


def sheets(
    images: Annotated[Tensor, "B H W"], sizes: Sequence[tuple[int, ...]], planes: int, kernels: Sequence[Kernels]
) -> tuple[Annotated[Tensor, "T"], list[Sheet]]:
    """The memory of several octaves, and its parts.

    Args:
        images: (B, H, W); only the number, type and device matter.
        sizes: of the images of each octave.
        planes: of each octave, at least 2: windows at the end of one reach into the next.
        kernels: all that will be used.
    """
    radius = max(max(kernel.radii) for kernel in kernels)
    count, margin = len(images), -(-radius // BLOCK) * BLOCK
    steps = [margin + count * math.prod(_whole(size)) for size in sizes]
    memory = images.new_empty(planes * sum(steps))
    scratch = images.new_zeros(steps[0] - margin + 2 * radius * _whole(sizes[0])[1])
    parts = memory.split([planes * step for step in steps])
    return memory, [Sheet(part.view(planes, -1), scratch, count, size) for part, size in zip(parts, sizes, strict=True)]


def _whole(size: Sequence[int]) -> tuple[int, ...]:
    """The size in whole blocks."""
    return tuple(-(-n // BLOCK) * BLOCK for n in size)


def _windows(
    values: Annotated[Tensor, "T"], start: int, length: int, matrix: Annotated[Tensor, "_ BLOCK window"], step: int
) -> Annotated[Tensor, "blocks window*step"]:
    """For each block of ``BLOCK * step`` values from the start on, those that it is computed from."""
    window = matrix.shape[2] * step
    reach = (window - BLOCK * step) // 2
    return values[start - reach : start + length + reach].unfold(0, window, BLOCK * step)
