"""Keypoints as extrema of the differences of Gaussians (Lowe 2004, sections 3.1 and 4), of images and volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.detection.neighbours import is_extremum
from kaf_layer.detection.quadratic import FAR, Fit, fit_quadratic, is_corner
from kaf_layer.detection.scale_space import ScaleSpace

__all__ = ["Extrema", "find_extrema", "locate", "refine", "select"]

STEPS = 5  # an extremum that has not settled by then is given up, as in OpenCV
STRIP = 2**17  # pixels that a CPU searches at a time: memory that is small enough is reused, not asked for again
THINNEST = 8  # the fewest rows, or slices, of a strip: their neighbours are searched along with them
DENSITY = {2: 64, 3: 512}  # without a count, room for one extremum in so many: white noise has one in 1500 and 11000


class Extrema(NamedTuple):
    """Where pixels of a :class:`ScaleSpace` are, all of one shape.

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

    def take(self, index: Tensor) -> Extrema:
        """The pixels at ``index`` of the first axis, in its shape."""
        return Extrema(*(v.index_select(0, index.flatten()).view(*index.shape, *v.shape[1:]) for v in self))

    def gather(self, index: Annotated[Tensor, "B M"]) -> Extrema:
        """Of (B, N) pixels those at ``index`` of each image."""
        # take_along_dim() would make the batch size a constant under export, as would len() in this file.
        columns = (index.view(*index.shape, *(1,) * (v.ndim - 2)).expand(-1, -1, *v.shape[2:]) for v in self)
        return Extrema(*(v.gather(1, column) for v, column in zip(self, columns, strict=True)))


def find_extrema(space: ScaleSpace, *, threshold: float, static: bool) -> tuple[Extrema, Annotated[Tensor, "C"]]:
    """The pixels of all images that are extrema among their neighbours, and which of the slots hold one.

    Args:
        space: the scale space. A pixel of an image is compared with the 26 others of its neighbourhood, a voxel with
            its 6 neighbours and itself in the layers below and above.
        threshold: the least magnitude, in units of the image.
        static: do not ask how many there are, which would wait for the device, but make room for
            one in DENSITY pixels of each octave.
    """
    found, start, border = [], 0, space.border
    for grid, gaussians in zip(space.grids, space.octaves(), strict=True):
        rows = grid.size[0] - 2 * border
        strip = rows if static else max(THINNEST, STRIP // math.prod(grid.size[1:]))
        strips = (gaussians[:, :, y : y + strip + 2 * border] for y in range(0, rows, strip))
        mask = torch.cat([is_extremum(part, threshold, border) for part in strips], dim=2)
        if static:
            room = mask[0].numel() // DENSITY[len(grid.size)] + 1
            mask = mask & (mask.flatten(1).cumsum(1, dtype=torch.int32) <= room).view_as(mask)
            slots = torch.nonzero_static(mask, size=mask.shape[0] * room, fill_value=-1)
        else:
            slots = F.pad(mask.nonzero(), (0, 0, 0, 1), value=-1)
        image, layer, *place = slots.unbind(1)
        size, stride = (_constant(values, image) for values in (grid.size, grid.stride))
        pitch = _constant(grid.pitch, image.to(space.values.dtype))
        # Empty slots hold a pixel that exists.
        pixel = torch.stack([layer.clamp(min=0) + 1, *(value.clamp(min=0) + border for value in place)], dim=1)
        found.append((image, image.clamp(min=0) * space.values.shape[1] + start, size, stride, pitch, pixel))
        start += gaussians[0].numel()
    extrema = Extrema(*(torch.cat(values) for values in zip(*found, strict=True)))
    return extrema, extrema.image >= 0


def _constant(values: Sequence[float], like: Annotated[Tensor, "C"]) -> Annotated[Tensor, "C D"]:
    # A tensor of the values would be a synchronising copy on CUDA.
    return torch.stack([torch.full_like(like, value) for value in values], dim=1)


def refine(
    space: ScaleSpace,
    extrema: Extrema,
    valid: Tensor,
    *,
    contrast_threshold: float,
    edge_threshold: float,
    static: bool,
) -> tuple[Extrema, Tensor, Tensor]:
    """Moves extrema to the pixel that their quadratic peaks in, if in an image, and rejects weak ones and edges.

    Args:
        space: the scale space.
        extrema: the candidates of all images.
        valid: which of them are extrema.
        contrast_threshold: the least contrast, times the number of layers, in units of the image.
        edge_threshold: the largest ratio of the principal curvatures.
        static: fit all candidates in every step, not those alone that still move.

    Returns:
        the moved extrema, which of them are keypoints, and their response: the magnitude of the contrast.
    """
    planar = extrema.size.shape[-1] == 2
    if planar:
        extrema, valid = _follow(space, extrema, valid, static=static)
    result = fit(space, extrema, valid)
    if planar:
        valid = valid & (result.offset.abs() < 0.5).all(-1)  # else it has not settled
    response = result.contrast().abs()
    # Curvatures per distance, not per pixel.
    pitch = extrema.pitch[..., None] * extrema.pitch[..., None, :]
    corner = is_corner(result.hessian[..., 1:, 1:] / pitch, edge_threshold)
    return extrema, valid & corner & (response * space.layers >= contrast_threshold), response


def _follow(space: ScaleSpace, extrema: Extrema, valid: Tensor, *, static: bool) -> tuple[Extrema, Tensor]:
    """Moves extrema of images to the pixel that their quadratic peaks in.

    In volumes extrema stay where they are: half of them would not settle, and the others are found again less often.
    """
    moving = torch.arange(valid.shape[0], device=valid.device)
    for _ in range(STEPS - 1):
        old, alive = extrema.take(moving), valid[moving]
        move = fit(space, old, alive).offset.clamp(-FAR, FAR).nan_to_num(FAR).round().long()
        new = old.pixel + move
        layer, pixel = new[..., 0], new[..., 1:]
        alive = alive & (layer >= 1) & (layer <= space.layers)
        alive = alive & ((pixel >= space.border) & (pixel < old.size - space.border)).all(-1)
        new = torch.where(alive[:, None], new, old.pixel)
        extrema = extrema._replace(pixel=extrema.pixel.index_copy(0, moving, new))
        valid = valid.index_copy(0, moving, alive)
        if not static:
            moving = moving[alive & (move != 0).any(-1)]
    return extrema, valid


def select(
    extrema: Extrema, valid: Tensor, response: Tensor, *, batch: int, slots: int, static: bool
) -> tuple[Extrema, Annotated[Tensor, "B N"]]:
    """The strongest keypoints of each image, by descending response, each pixel once.

    Args:
        extrema: the candidates of all images.
        valid: which of them are keypoints.
        response: what they are ordered by.
        batch: the number of images.
        slots: the most keypoints that an image keeps.
        static: return that many slots, however many are used.
    """
    # Two candidates may have moved to one pixel. Sorting also makes the order independent of the search's.
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


def locate(
    space: ScaleSpace, extrema: Extrema, valid: Tensor
) -> tuple[Annotated[Tensor, "... D"], Annotated[Tensor, "..."], Annotated[Tensor, "..."]]:
    """The centre of each keypoint, (x, y) or (x, y, z), and its scale, in pixels of its octave; and its contrast.

    Differentiable. Scales are in pixels of the finest axis.
    """
    peak = fit(space, extrema, valid)
    place = extrema.pixel + peak.step()
    return place[..., 1:].flip(-1), space.sigma * 2 ** (place[..., 0] / space.layers), peak.contrast()


def fit(space: ScaleSpace, extrema: Extrema, valid: Tensor) -> Fit:
    """The quadratic through the differences of Gaussians about each pixel, along (layer, y, x) or (layer, z, y, x).

    Differentiable, and finite where not valid.
    """
    axes = extrema.pixel.shape[-1]
    index = extrema.position()
    strides = [torch.ones_like(index)]
    for size in reversed(extrema.size.unbind(-1)):
        strides.insert(0, strides[0] * size)
    for axis, stride in enumerate(strides):
        # Four Gaussians have three differences.
        steps = torch.arange(-1, 2 if axis else 3, device=index.device)
        index = index[..., None] + steps * stride.view(*stride.shape, *(1,) * (axis + 1))
    cube = space.take(index).diff(dim=-axes)
    return fit_quadratic(cube.where(valid.view(*valid.shape, *(1,) * axes), 0.0), axes)
