"""Gradients on a grid around each keypoint, sampled from the keypoint's own layer of the scale space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.pyramid import ScaleSpace
from kaf_layer.detection.sift.refinement import Place

__all__ = ["sample_gradients", "upright"]


def upright(place: Place) -> Annotated[Tensor, "B N D D"]:
    """A frame for each keypoint that is not turned."""
    dims = place.centre.shape[-1]
    identity = torch.eye(dims, dtype=place.scale.dtype, device=place.scale.device)
    return identity.expand(*place.scale.shape, dims, dims)


def sample_gradients(
    space: ScaleSpace, extrema: Extrema, place: Place, frame: Annotated[Tensor, "B N D D"], samples: int, step: float
) -> list[Annotated[Tensor, "B N P"]]:
    """The gradients at P = ``samples`` ** D points around each keypoint, along the D axes of its frame.

    The points lie ``step`` scales apart in a square or cube along the columns of the frame, the first column fastest.
    Outside the image there is no gradient. Distances are physical; gradients are not divided by the step.
    """
    dims, scale = place.centre.shape[-1], place.scale
    last = (samples + 1) / 2 * step  # one point more at either end, for differences
    axis = torch.linspace(-last, last, samples + 2, device=scale.device, dtype=scale.dtype)
    grid = torch.stack(torch.meshgrid([axis] * dims, indexing="ij")[::-1])
    points = frame @ grid.flatten(1)
    reach = scale[..., None] / extrema.pitch.flip(-1)
    points = torch.addcmul(place.centre[..., None], points, reach[..., None])
    patch, inside = (torch.unflatten(values, -1, grid.shape[1:]) for values in _interpolate(space, extrema, points))
    inside = _inner(inside)
    # The last axis of the patch runs along the frame's first column.
    columns = range(-1, -1 - dims, -1)
    return [((_inner(patch, axis, 2) - _inner(patch, axis, 0)) * inside).flatten(2) for axis in columns]


def _inner(patch: Annotated[Tensor, "B N *S"], axis: int | None = None, start: int = 1) -> Tensor:
    """The patch without its outermost points; along one axis it may start elsewhere."""
    for other in range(2 - patch.ndim, 0):
        patch = patch.narrow(other, start if other == axis else 1, patch.shape[other] - 2)
    return patch


def _interpolate(
    space: ScaleSpace, extrema: Extrema, points: Annotated[Tensor, "B N D P"]
) -> tuple[Annotated[Tensor, "B N P"], Annotated[Tensor, "B N P"]]:
    """Linear interpolation along every axis, and which of the points lie inside the layer."""
    last = extrema.size.flip(-1)[..., None] - 1  # in the order of the points, x first
    inside = ((points >= 0) & (points <= last)).all(2)
    low = points.detach().floor().clamp(min=0).minimum(last - 1)
    layer = extrema.start + extrema.pixel[..., 0] * extrema.step[..., 0]
    corner, steps = low.long().unbind(2), extrema.step[..., 1:].flip(-1)[..., None].unbind(2)
    index = layer[..., None] + corner[0]  # whose step is 1
    for along, step in zip(corner[1:], steps[1:], strict=True):
        index = torch.addcmul(index, along, step)
    return _between(space, index, [1, *steps[1:]], (points - low).unbind(2)), inside


def _between(space: ScaleSpace, index: Tensor, strides: Sequence[int | Tensor], fractions: Sequence[Tensor]) -> Tensor:
    """Interpolates along the first axis, then along the next, from each index and those one stride further."""
    if not strides:
        return space.take(index)
    low, high = (_between(space, i, strides[:-1], fractions[:-1]) for i in (index, index + strides[-1]))
    return torch.lerp(low, high, fractions[-1])
