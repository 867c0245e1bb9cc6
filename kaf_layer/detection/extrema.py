"""Keypoints as extrema of the differences of Gaussians (Lowe 2004, sections 3.1 and 4)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.detection.scale_space import BORDER, ScaleSpace

__all__ = ["Extrema", "find_extrema", "locate", "refine", "select"]

STEPS = 5  # an extremum that has not settled by then is given up, as in OpenCV
STRIP = 128  # rows that a CPU searches at a time: memory that is small enough is reused, not asked for again
DENSITY = 64  # without a count, room for one extremum in so many pixels: white noise has one in 1500

FAR = 1e6  # outside of any image; infinity would not survive the conversion to integers


class Extrema(NamedTuple):
    """Where pixels of a :class:`ScaleSpace` are: whole numbers, all of one shape.

    ``start`` is the index of the octave's first value in the flattened scale space; ``octave``,
    ``height`` and ``width`` describe that octave; the rest is the pixel in it.
    """

    image: Tensor
    start: Tensor
    octave: Tensor
    height: Tensor
    width: Tensor
    layer: Tensor
    y: Tensor
    x: Tensor

    @property
    def position(self) -> Tensor:
        """The index in the flattened scale space."""
        return self.start + (self.layer * self.height + self.y) * self.width + self.x

    def take(self, index: Tensor) -> Extrema:
        """The pixels at ``index``, in its shape."""
        return Extrema(*(value.index_select(0, index.flatten()).view_as(index) for value in self))


class Fit(NamedTuple):
    """The quadratic through the 3x3x3 neighbourhood of an extremum (Brown and Lowe 2002)."""

    offset: Annotated[Tensor, "... 3"]
    contrast: Annotated[Tensor, "..."]
    hessian: Annotated[Tensor, "... 3 3"]


def find_extrema(space: ScaleSpace, *, threshold: float, static: bool) -> tuple[Extrema, Annotated[Tensor, "C"]]:
    """The pixels of all images that are extrema among their 26 neighbours, and which of the slots hold one.

    Args:
        space: the scale space.
        threshold: the least magnitude, in units of the image.
        static: do not ask how many there are, which would wait for the device, but make room for
            one in 64 pixels of each octave.
    """
    found, start = [], 0
    for octave, gaussians in enumerate(space.octaves):
        rows = gaussians[0].shape[1] - 2 * BORDER
        strip = rows if static else STRIP
        strips = ([layer[:, y : y + strip + 2 * BORDER] for layer in gaussians] for y in range(0, rows, strip))
        mask = torch.cat([_is_extremum(layers, threshold) for layers in strips], dim=2)
        if static:
            room = mask[0].numel() // DENSITY + 1
            mask = mask & (mask.flatten(1).cumsum(1, dtype=torch.int32) <= room).view_as(mask)
            slots = torch.nonzero_static(mask, size=len(mask) * room, fill_value=-1)
        else:
            slots = F.pad(mask.nonzero(), (0, 0, 0, 1), value=-1)
        image, layer, y, x = slots.unbind(1)
        height, width = gaussians[0].shape[1:]
        constants = [torch.full_like(x, value) for value in (octave, height, width)]
        first = image.clamp(min=0) * space.values.shape[1] + start
        # Empty slots hold a pixel that exists.
        found.append((image, first, *constants, layer.clamp(min=0) + 1, y + BORDER, x + BORDER))
        start += len(gaussians) * height * width
    extrema = Extrema(*(torch.cat(values) for values in zip(*found, strict=True)))
    return extrema, extrema.image >= 0


def _is_extremum(gaussians: list[Tensor], threshold: float) -> Annotated[Tensor, "B layers H-10 W-10"]:
    differences = [b - a for a, b in pairwise(gaussians)]
    masks = []
    for below, centre, above in zip(differences, differences[1:], differences[2:], strict=False):
        inner = centre[:, BORDER:-BORDER, BORDER:-BORDER]
        is_maximum = (inner > threshold) & (inner >= _neighbours(torch.maximum, below, centre, above))
        is_minimum = (inner < -threshold) & (inner <= _neighbours(torch.minimum, below, centre, above))
        masks.append(is_maximum | is_minimum)
    return torch.stack(masks, dim=1)


def _neighbours(reduce: Callable[[Tensor, Tensor], Tensor], *layers: Tensor) -> Annotated[Tensor, "B H-10 W-10"]:
    """The largest or smallest value in the 3x3x3 neighbourhood of each pixel within the border."""
    below, centre, above = (layer[:, BORDER - 1 : 1 - BORDER, BORDER - 1 : 1 - BORDER] for layer in layers)
    value = reduce(reduce(below, centre), above)
    value = reduce(reduce(value[:, :-2], value[:, 1:-1]), value[:, 2:])
    return reduce(reduce(value[..., :-2], value[..., 1:-1]), value[..., 2:])


def refine(
    space: ScaleSpace,
    extrema: Extrema,
    valid: Tensor,
    *,
    contrast_threshold: float,
    edge_threshold: float,
    static: bool,
) -> tuple[Extrema, Tensor, Tensor]:
    """Moves extrema to the pixel that their quadratic peaks in, and rejects weak ones and edges.

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
    moving = torch.arange(len(valid), device=valid.device)
    for _ in range(STEPS - 1):
        old, alive = extrema.take(moving), valid[moving]
        move = fit(space, old, alive).offset.clamp(-FAR, FAR).nan_to_num(FAR).round().long()
        layer, y, x = (position + step for position, step in zip(old[5:], move.unbind(-1), strict=True))
        alive = alive & (layer >= 1) & (layer <= space.layers)
        alive = alive & (y >= BORDER) & (y < old.height - BORDER) & (x >= BORDER) & (x < old.width - BORDER)
        pixel = (
            positions.index_copy(0, moving, torch.where(alive, new, unmoved))
            for positions, new, unmoved in zip(extrema[5:], (layer, y, x), old[5:], strict=True)
        )
        extrema = Extrema(*extrema[:5], *pixel)
        valid = valid.index_copy(0, moving, alive)
        if not static:
            moving = moving[alive & (move != 0).any(-1)]
    result = fit(space, extrema, valid)
    settled = (result.offset.abs() < 0.5).all(-1)
    response = result.contrast.abs()
    spatial = result.hessian[..., 1:, 1:]
    trace = spatial[..., 0, 0] + spatial[..., 1, 1]
    determinant = spatial[..., 0, 0] * spatial[..., 1, 1] - spatial[..., 0, 1] ** 2
    # Lowe 2004, section 4.1; a determinant of zero or less fails it as well.
    is_corner = trace**2 * edge_threshold < (edge_threshold + 1) ** 2 * determinant
    return extrema, valid & settled & is_corner & (response * space.layers >= contrast_threshold), response


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
    location, order = torch.where(valid, extrema.position, -1).sort(stable=True)
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
    return extrema.take(order[position.clamp(max=len(order) - 1)]), position < last


def locate(
    space: ScaleSpace, extrema: Extrema, valid: Tensor
) -> tuple[Annotated[Tensor, "... 2"], Annotated[Tensor, "..."], Annotated[Tensor, "..."]]:
    """The centre (x, y) and scale of each keypoint, in pixels of its octave, and its contrast; differentiable."""
    peak = fit(space, extrema, valid)
    layer, y, x = (pixel + offset for pixel, offset in zip(extrema[5:], peak.offset.unbind(-1), strict=True))
    return torch.stack([x, y], dim=-1), space.sigma * 2 ** (layer / space.layers), peak.contrast


def fit(space: ScaleSpace, extrema: Extrema, valid: Tensor) -> Fit:
    """Fits a quadratic to the differences of Gaussians about each pixel (Lowe 2004, equations 2 and 3).

    The offset of its peak is ``-H^-1 g`` in (layer, y, x) and its contrast ``D + g . offset / 2``, with
    the gradient g and Hessian H from central differences. Differentiable, and finite where not valid.
    """
    rows, columns = extrema.width[..., None, None], torch.arange(-1, 2, device=extrema.x.device)
    layers = torch.arange(-1, 3, device=extrema.x.device)[:, None, None]
    plane = (extrema.height * extrema.width)[..., None, None, None]
    index = (
        extrema.position[..., None, None, None] + layers * plane + (columns[:, None] * rows + columns)[..., None, :, :]
    )
    cube = space.take(index).diff(dim=-3).where(valid[..., None, None, None], 0.0)
    centre = cube[..., 1, 1, 1]
    gradient = torch.stack(
        [
            cube[..., 2, 1, 1] - cube[..., 0, 1, 1],
            cube[..., 1, 2, 1] - cube[..., 1, 0, 1],
            cube[..., 1, 1, 2] - cube[..., 1, 1, 0],
        ],
        dim=-1,
    ).mul(0.5)
    ss = cube[..., 2, 1, 1] + cube[..., 0, 1, 1] - 2 * centre
    yy = cube[..., 1, 2, 1] + cube[..., 1, 0, 1] - 2 * centre
    xx = cube[..., 1, 1, 2] + cube[..., 1, 1, 0] - 2 * centre
    sy = (cube[..., 2, 2, 1] - cube[..., 2, 0, 1] - cube[..., 0, 2, 1] + cube[..., 0, 0, 1]) / 4
    sx = (cube[..., 2, 1, 2] - cube[..., 2, 1, 0] - cube[..., 0, 1, 2] + cube[..., 0, 1, 0]) / 4
    yx = (cube[..., 1, 2, 2] - cube[..., 1, 2, 0] - cube[..., 1, 0, 2] + cube[..., 1, 0, 0]) / 4
    hessian = torch.stack([ss, sy, sx, sy, yy, yx, sx, yx, xx], dim=-1).unflatten(-1, (3, 3))
    offset = -_solve(hessian, gradient)
    return Fit(offset, centre + 0.5 * (gradient * offset).sum(-1), hessian)


def _solve(matrix: Annotated[Tensor, "... 3 3"], vector: Annotated[Tensor, "... 3"]) -> Annotated[Tensor, "... 3"]:
    """Cramer's rule; a library's solver would wait for the device to tell whether the matrix is singular."""
    a, b, c = matrix.unbind(-2)
    cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], dim=-2)
    determinant = (a * cofactors[..., 0, :]).sum(-1, keepdim=True)
    regular = determinant != 0
    solution = (cofactors * vector[..., None]).sum(-2) / torch.where(regular, determinant, 1.0)
    return torch.where(regular, solution, FAR)
