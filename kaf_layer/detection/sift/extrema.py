"""Candidates for keypoints: extrema of the differences of Gaussians (Lowe 2004, section 3.1)."""

from __future__ import annotations

import math
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
    """Places of pixels in a ``ScaleSpace``, M of each image.

    Args:
        start: the index of the image's and octave's first value in the flattened scale space.
        step: how far apart values are there, from one layer to the next and from one pixel to the next.
        size: of the octave, as in ``Octave``.
        stride: of the octave.
        pitch: of the octave.
        pixel: the layer and the pixel in it, in tensor order.
    """

    start: Annotated[Tensor, "B M"]
    step: Annotated[Tensor, "B M 1+D"]
    size: Annotated[Tensor, "B M D"]
    stride: Annotated[Tensor, "B M D"]
    pitch: Annotated[Tensor, "B M D"]
    pixel: Annotated[Tensor, "B M 1+D"]

    def position(self) -> Annotated[Tensor, "B M"]:
        """The index in the flattened scale space."""
        return self.start + (self.pixel * self.step).sum(-1)

    def stencil(self) -> Annotated[Tensor, "B M 4 *3"]:
        """What is added to the position to reach the neighbours: one pixel to either side; four layers."""
        reach = torch.arange(-1, 3, device=self.start.device)
        *steps, _ = self.step.unbind(-1)  # the last is 1
        offsets = reach[:3]
        for axis, step in enumerate(reversed(steps), start=1):
            along = reach if axis == len(steps) else reach[:3]  # four Gaussians have three differences
            ones = (None,) * axis
            offsets = torch.addcmul(offsets.unsqueeze(-axis - 1), step[(..., None, *ones)], along[(..., *ones)])
        return offsets

    def take(self, index: Annotated[Tensor, "N"]) -> Extrema:
        """The pixels at ``index`` of all images."""
        return Extrema(*(values.index_select(1, index) for values in self))

    def gather(self, index: Annotated[Tensor, "B N"]) -> Extrema:
        """The pixels at ``index`` of each image."""
        # take_along_dim() would make the batch size a constant under export, as would len() in this file.
        columns = (index.view(*index.shape, *(1,) * (v.ndim - 2)).expand(-1, -1, *v.shape[2:]) for v in self)
        return Extrema(*(v.gather(1, column) for v, column in zip(self, columns, strict=True)))


def find_extrema(space: ScaleSpace, *, threshold: float, room: int | None) -> tuple[Extrema, Annotated[Tensor, "B M"]]:
    """Finds the pixels that are extrema among their neighbours, and which slots hold one.

    Args:
        space: the scale space. A pixel of an image is compared with the 26 others of its neighbourhood, a voxel with
            its 6 neighbours and itself in the layers below and above.
        threshold: the least magnitude, in units of the image.
        room: the largest number for each octave of an image; the strongest are kept. Smaller octaves have fewer slots.
            None makes as many slots as there are extrema, which waits for the device. It is for a single image.
    """
    search = partial(_all, threshold=threshold) if room is None else partial(_strongest, room=room)
    found = [search(gaussians, space.border) for gaussians in space.octaves]
    strength, index = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
    images, counts = strength.shape[0], [slots.shape[1] for slots, _ in found]
    start, along, step, size, stride, pitch = (
        torch.cat([row.expand(count, -1) for row, count in zip(rows, counts, strict=True)]).expand(images, -1, -1)
        for rows in space.tables()
    )
    pixel: list[Tensor] = []
    for length in reversed((size - 2 * space.border).unbind(-1)):
        pixel.insert(0, index % length + space.border)
        index = index // length
    image = torch.arange(images, device=index.device)[:, None, None]
    start = torch.addcmul(start, along, image)[..., 0]
    extrema = Extrema(start, step, size, stride, pitch, torch.stack([index + 1, *pixel], dim=-1))
    return extrema, strength > threshold


Found = tuple[Annotated[Tensor, "B M"], Annotated[Tensor, "B M"]]


def _all(gaussians: Annotated[Tensor, "1 layers+3 *S"], border: int, *, threshold: float) -> Found:
    """Slots for the extrema of an octave: their strength, and their index among the pixels searched."""
    rows = gaussians.shape[2] - 2 * border
    strip = max(THINNEST, STRIP // math.prod(gaussians.shape[3:]))
    strips = (gaussians[:, :, y : y + strip + 2 * border] for y in range(0, rows, strip))
    mask = torch.cat([is_extremum(part, threshold, border) for part in strips], dim=2)
    # There is at least one slot, which holds an existing pixel.
    index = F.pad(mask.flatten().nonzero().mT, (0, 1), value=-1)
    return torch.where(index >= 0, math.inf, 0.0), index.clamp(min=0)


def _strongest(gaussians: Annotated[Tensor, "B layers+3 *S"], border: int, *, room: int) -> Found:
    """The same for the extrema of the largest differences; every image has the given number of slots."""
    strength = extremal_strength(gaussians, border).flatten(1)
    return strength.topk(min(room, strength.shape[1] // DENSITY + 1), sorted=False)


def select(
    extrema: Extrema, valid: Annotated[Tensor, "B M"], response: Annotated[Tensor, "B M"], *, slots: int
) -> tuple[Extrema, Annotated[Tensor, "B N"]]:
    """Selects the strongest keypoints of each image, by descending response, each pixel once.

    Args:
        extrema: the candidates.
        valid: which of them are keypoints.
        response: the value by which they are sorted.
        slots: the largest number of keypoints of an image.
    """
    # Two candidates may have moved to one pixel. Sorting also makes the order independent of the search order.
    location, order = torch.where(valid, extrema.position(), -1).sort(dim=1, stable=True)
    is_first = location != F.pad(location[:, :-1], (1, 0), value=-1)  # -1 comes first, and is none
    response = torch.where(is_first, response.gather(1, order), -1.0)
    response, by_response = response.sort(dim=1, descending=True, stable=True)
    chosen = order.gather(1, by_response[:, :slots])
    return extrema.gather(chosen), response[:, :slots] >= 0
