"""Orientation and description of SIFT keypoints (Lowe 2004, sections 5 and 6), sampled from the scale space.

Both sample a square patch around each keypoint bilinearly, in proportion to its scale. So every keypoint
costs the same, and the weights of a sample are constants.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.pyramid import ScaleSpace

__all__ = ["describe", "orient"]

TURN = 2 * math.pi
ANGLE_BINS, ANGLE_SAMPLES = 36, 13
CELLS, DIRECTIONS, SAMPLES = 4, 8, 16
CELL = 3.0  # the side of a cell in scales, as in OpenCV


def orient(
    space: ScaleSpace, extrema: Extrema, centre: Tensor, scale: Tensor
) -> tuple[Annotated[Tensor, "B N 36"], Annotated[Tensor, "B N 36"]]:
    """The directions of the gradient around each keypoint that may be its orientation.

    Args:
        space: the scale space.
        extrema: (B, N) pixels of the scale space.
        centre: (B, N, 2), the keypoints' ``(x, y)`` in their octaves.
        scale: (B, N), their scales in their octaves.

    Returns:
        The angle at which each of 36 bins of the gradient's histogram peaks, in radians from the x axis towards the
        y axis, and the bin's strength relative to the strongest, which is 0 unless it is a peak of at least 80 % of it.
    """
    # Gradients within 3 times 1.5 scales, weighted by a Gaussian of 1.5 scales.
    axis = torch.linspace(-4.5, 4.5, ANGLE_SAMPLES, device=scale.device, dtype=scale.dtype)
    step = 9 / (ANGLE_SAMPLES - 1)
    magnitude, angle = _gradients(space, extrema, centre, scale, torch.zeros_like(scale), ANGLE_SAMPLES, step)
    weight = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2)).flatten()
    position = angle * (ANGLE_BINS / TURN) % ANGLE_BINS
    lower = position.floor()
    share = torch.cat([1 - position + lower, position - lower], dim=-1) * (magnitude * weight).repeat(1, 1, 2)
    bins = torch.cat([lower, lower + 1], dim=-1).long() % ANGLE_BINS
    # Integers are summed, so that the order of the sum does not matter.
    histogram = torch.zeros_like(bins[..., :ANGLE_BINS])
    histogram = histogram.scatter_add(-1, bins, (share * 2**32).long()).to(scale.dtype)
    next_to, beyond = histogram.roll(1, -1) + histogram.roll(-1, -1), histogram.roll(2, -1) + histogram.roll(-2, -1)
    smooth = 6 * histogram + 4 * next_to + beyond
    left, right = smooth.roll(1, -1), smooth.roll(-1, -1)
    strongest = smooth.amax(-1, keepdim=True)
    is_peak = (smooth > left) & (smooth > right) & (smooth >= 0.8 * strongest)
    curvature = torch.where(is_peak, left - 2 * smooth + right, 1.0)
    peak = torch.arange(ANGLE_BINS, device=scale.device) + 0.5 * (left - right) / curvature
    return peak * (TURN / ANGLE_BINS), torch.where(is_peak, smooth / strongest, 0.0)


def describe(
    space: ScaleSpace, extrema: Extrema, centre: Tensor, scale: Tensor, angle: Tensor, *, root: bool
) -> Annotated[Tensor, "B N 128"]:
    """Histograms of gradients, 8 directions in 4x4 cells along the keypoint's angle, in OpenCV's order.

    Args:
        space: the scale space.
        extrema: (B, N) pixels of it.
        centre: (B, N, 2), the keypoints' ``(x, y)`` in their octaves.
        scale: (B, N), their scales in their octaves.
        angle: (B, N), in radians.
        root: RootSIFT (Arandjelovic and Zisserman 2012) instead of SIFT; of length 1 as well.
    """
    # Samples lie up to half a cell outside the 4x4 cells, where their weight ends.
    side = CELLS + 1
    magnitude, direction = _gradients(space, extrema, centre, scale, angle, SAMPLES, CELL * side / SAMPLES)
    axis = (torch.arange(SAMPLES, device=scale.device, dtype=scale.dtype) + 0.5) * (side / SAMPLES) - side / 2
    cell = torch.arange(CELLS, device=scale.device, dtype=scale.dtype) - (CELLS - 1) / 2
    weight = F.relu(1 - (axis[:, None] - cell).abs()) * torch.exp(-(axis[:, None] ** 2) / (CELLS**2 / 2))
    cells = torch.einsum("yi,xj->ijyx", weight, weight).flatten(2).flatten(0, 1)
    # OpenCV counts directions from the x axis away from the y axis. Bin 8 is bin 0 again.
    bins = torch.arange(DIRECTIONS + 1, device=scale.device, dtype=scale.dtype)[:, None]
    position = -direction * (DIRECTIONS / TURN) % DIRECTIONS
    directions = F.relu(1 - (position[..., None, :] - bins).abs()) * magnitude[..., None, :]
    histogram = directions @ cells.T
    histogram = torch.cat([histogram[..., :1, :] + histogram[..., -1:, :], histogram[..., 1:-1, :]], dim=-2)
    values = F.normalize(histogram.mT.flatten(-2), dim=-1).clamp(max=0.2)
    if root:
        # A root's gradient at 0 is infinite.
        return F.normalize(values, p=1, dim=-1).clamp(min=1e-8).sqrt()
    return F.normalize(values, dim=-1)


def _gradients(
    space: ScaleSpace, extrema: Extrema, centre: Tensor, scale: Tensor, angle: Tensor, samples: int, step: float
) -> tuple[Annotated[Tensor, "B N S"], Annotated[Tensor, "B N S"]]:
    """Magnitude and direction, relative to ``angle``, of the gradient at ``samples`` x ``samples`` points.

    The points lie ``step`` scales apart in a square that is rotated by the angle. Outside the image there is no
    gradient.
    """
    axis = (torch.arange(samples + 2, device=scale.device, dtype=scale.dtype) - (samples + 1) / 2) * step
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    cosine, sine = ((wave * scale)[..., None, None, None] for wave in (angle.cos(), angle.sin()))
    points = centre[..., None, None] + torch.stack([u, v]) * cosine + torch.stack([-v, u]) * sine
    patch, inside = _sample(space, extrema, points)
    du = patch[..., 1:-1, 2:] - patch[..., 1:-1, :-2]
    dv = patch[..., 2:, 1:-1] - patch[..., :-2, 1:-1]
    square = du**2 + dv**2
    # Neither the root nor the angle has a gradient where there is none.
    exists = inside[..., 1:-1, 1:-1] & (square > 0)
    magnitude = torch.where(exists, square, 1.0).sqrt() * exists
    return magnitude.flatten(-2), torch.atan2(dv, torch.where(exists, du, 1.0)).flatten(-2)


def _sample(
    space: ScaleSpace, extrema: Extrema, points: Annotated[Tensor, "B N 2 S S"]
) -> tuple[Annotated[Tensor, "B N S S"], Annotated[Tensor, "B N S S"]]:
    """Bilinear samples of each extremum's own layer at ``(x, y)``, and which of them lie inside it."""
    last = (extrema.size.flip(-1) - 1)[..., None, None]
    inside = ((points >= 0) & (points <= last)).all(2)
    corner = points.detach().floor().long().clamp(min=0).minimum(last - 1)
    (left, top), (x, y) = corner.unbind(2), (points - corner).unbind(2)
    layer = extrema.pixel[..., 0] * extrema.size.prod(-1)
    width = extrema.size[..., 1, None, None]
    upper = (extrema.start + layer)[..., None, None] + top * width + left
    above, below = (torch.lerp(space.take(row), space.take(row + 1), x) for row in (upper, upper + width))
    return torch.lerp(above, below, y), inside
