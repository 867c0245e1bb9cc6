"""Candidates for keypoints: extrema of the differences of Gaussians (Lowe 2004, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.detection.sift.neighbours import extremal_strength, is_extremum
from kaf_layer.detection.sift.pyramid import ScaleSpace

__all__ = ["Extrema", "find_extrema", "select"]

STRIP = 2**17  # pixels that a CPU searches at a time; small blocks of memory are reused, not allocated again
THINNEST = 8  # the fewest rows, or slices, of a strip: their neighbours are searched along with them
DENSITY = 64  # with a fixed number of slots, one at most for so many pixels: white noise has one extremum in 1500


class Extrema(NamedTuple):
    """Places of pixels in a :class:`ScaleSpace`; all fields have one shape.

    ``start`` is the index of the octave's first value in the flattened scale space; ``size``, ``stride`` and
    ``pitch`` (..., D) describe that octave, as in :class:`Octave`; ``pixel`` (..., 1 + D) is the layer and the pixel
    in it, in tensor order.
    """

    image: Tensor
    start: Tensor
    size: Tensor
    stride: Tensor
    pitch: Tensor
    pixel: Tensor

    def position(self) -> Tensor:
        """The index in the flattened scale space."""
        index = self.pixel[..., 0]
        for pixel, size in zip(self.pixel[..., 1:].unbind(-1), self.size.unbind(-1), strict=True):
            index = index * size + pixel
        return self.start + index

    def stencil(self) -> Annotated[Tensor, "... 4 *3"]:
        """What is added to the position to reach the neighbours: one pixel to either side; four layers."""
        steps = torch.arange(-1, 3, device=self.start.device)
        offsets, stride = steps[:3], None
        for axis, size in enumerate(reversed(self.size.unbind(-1)), start=1):
            stride = size if stride is None else stride * size
            along = steps if axis == self.size.shape[-1] else steps[:3]  # four Gaussians have three differences
            offsets = offsets.unsqueeze(-axis - 1) + (stride[..., None] * along)[(..., *(None,) * axis)]
        return offsets

    def take(self, index: Tensor) -> Extrema:
        """The pixels at ``index`` of the first axis, in its shape."""
        return Extrema(*(v.index_select(0, index.flatten()).view(*index.shape, *v.shape[1:]) for v in self))

    def gather(self, index: Annotated[Tensor, "B M"]) -> Extrema:
        """Of (B, N) pixels those at ``index`` of each image."""
        # take_along_dim() would make the batch size a constant under export, as would len() in this file.
        columns = (index.view(*index.shape, *(1,) * (v.ndim - 2)).expand(-1, -1, *v.shape[2:]) for v in self)
        return Extrema(*(v.gather(1, column) for v, column in zip(self, columns, strict=True)))


def find_extrema(space: ScaleSpace, *, threshold: float, room: int | None) -> tuple[Extrema, Annotated[Tensor, "C"]]:
    """Finds the pixels of all images that are extrema among their neighbours, and which slots hold one.

    Args:
        space: the scale space. A pixel of an image is compared with the 26 others of its neighbourhood, a voxel with
            its 6 neighbours and itself in the layers below and above.
        threshold: the least magnitude, in units of the image.
        room: the largest number for each octave of an image; the strongest are kept. Smaller octaves have fewer slots.
            None makes as many slots as there are extrema, which waits for the device.
    """
    search = _all if room is None else partial(_strongest, room=room)
    found, rows, start = [], [], 0
    for grid, gaussians in zip(space.grids, space.octaves(), strict=True):
        found.append(search(gaussians, threshold, space.border))
        rows.append((start, *grid.size, *grid.stride))
        start += gaussians[0].numel()
    image, valid, index = (torch.cat(values) for values in zip(*found, strict=True))
    counts, dims = [slots.shape[0] for slots, *_ in found], len(space.grids[0].size)
    starts, size, stride = _repeat(rows, counts, image).split([1, dims, dims], dim=1)
    pitch = _repeat([grid.pitch for grid in space.grids], counts, space.values)
    place: list[Tensor] = []
    for length in reversed((size - 2 * space.border).unbind(1)):
        place.insert(0, index % length + space.border)
        index = index // length
    pixel = torch.stack([index + 1, *place], dim=1)
    return Extrema(image, starts[:, 0] + image * space.values.shape[1], size, stride, pitch, pixel), valid


Found = tuple[Annotated[Tensor, "C"], Annotated[Tensor, "C"], Annotated[Tensor, "C"]]


def _all(gaussians: Annotated[Tensor, "B layers+3 *S"], threshold: float, border: int) -> Found:
    """Slots for the extrema of an octave: image, whether there is one, and its index among the pixels searched."""
    rows = gaussians.shape[2] - 2 * border
    strip = max(THINNEST, STRIP // math.prod(gaussians.shape[3:]))
    strips = (gaussians[:, :, y : y + strip + 2 * border] for y in range(0, rows, strip))
    mask = torch.cat([is_extremum(part, threshold, border) for part in strips], dim=2)
    # There is at least one slot, which holds an existing pixel.
    image, index = F.pad(mask.flatten(1).nonzero(), (0, 0, 0, 1), value=-1).unbind(1)
    return image.clamp(min=0), image >= 0, index.clamp(min=0)


def _strongest(gaussians: Annotated[Tensor, "B layers+3 *S"], threshold: float, border: int, *, room: int) -> Found:
    """The same for the extrema of the largest differences; every image has the given number of slots."""
    strength = extremal_strength(gaussians, border).flatten(1)
    strength, index = strength.topk(min(room, strength.shape[1] // DENSITY + 1), sorted=False)
    image = torch.arange(strength.shape[0], device=strength.device)[:, None].expand_as(index)
    return image.flatten(), strength.flatten() > threshold, index.flatten()


def _repeat(rows: Sequence[Sequence[float]], counts: Sequence[int], like: Tensor) -> Annotated[Tensor, "C n"]:
    """Numbers that belong to octaves, repeated for each slot of the octave."""
    # A tensor of all numbers would be a synchronising copy on CUDA.
    numbers = {number: like.new_full((), number) for number in {number for row in rows for number in row}}
    lines = (torch.stack([numbers[number] for number in row]) for row in rows)
    return torch.cat([line.expand(count, -1) for line, count in zip(lines, counts, strict=True)])


def select(
    extrema: Extrema, valid: Tensor, response: Tensor, *, batch: int, slots: int, static: bool
) -> tuple[Extrema, Annotated[Tensor, "B N"]]:
    """Selects the strongest keypoints of each image, by descending response, each pixel once.

    Args:
        extrema: the candidates of all images.
        valid: which of them are keypoints.
        response: the value by which they are sorted.
        batch: the number of images.
        slots: the largest number of keypoints of an image.
        static: whether to return this number of slots, however many are used.
    """
    # Two candidates may have moved to one pixel. Sorting also makes the order independent of the search order.
    location, order = torch.where(valid, extrema.position(), -1).sort(stable=True)
    is_first = torch.cat([location[:1] >= 0, location[1:] != location[:-1]])
    extrema, response, valid = extrema.take(order), response[order], valid[order] & is_first
    by_response = torch.where(valid, response, -1.0).sort(descending=True, stable=True).indices
    image = torch.where(valid, extrema.image, batch)[by_response]
    image, by_image = image.sort(stable=True)
    order = by_response[by_image]
    bounds = torch.searchsorted(image, torch.arange(batch + 1, device=image.device))
    first, last = bounds[:-1, None], bounds[1:, None]
    if not static:
        slots = min(slots, int((last - first).max()))
    position = first + torch.arange(slots, device=image.device)
    return extrema.take(order[position.clamp(max=order.shape[0] - 1)]), position < last
