"""Orientation and description of keypoints in images (Lowe 2004, sections 5 and 6), sampled from the scale space.

Both sample a square patch around each keypoint bilinearly, in proportion to its scale. So every keypoint
costs the same, and the weights of a sample are constants.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.histograms import cell_weights, spacing_of, to_descriptor
from kaf_layer.detection.sift.patches import sample_gradients, upright
from kaf_layer.detection.sift.pyramid import ScaleSpace
from kaf_layer.detection.sift.refinement import Place

__all__ = ["describe", "orient", "peaks"]

ANGLE_BINS, ANGLE_SAMPLES = 36, 13
MOST = 4  # orientations of a keypoint: more peaks of 80 % do not fit into 36 smoothed bins
REACH, WINDOW = 4.5, 1.5  # gradients within 3 times 1.5 scales, weighted by a Gaussian of 1.5 scales
DIRECTIONS, SAMPLES = 8, 16
ONE = 2**32  # as an integer, of what is summed in integers


def orient(
    space: ScaleSpace, extrema: Extrema, valid: Annotated[Tensor, "B N"], place: Place, *, every: bool, slots: int
) -> tuple[Extrema, Annotated[Tensor, "B M"], Place]:
    """Gives keypoints their angles.

    Args:
        space: the scale space.
        extrema: (B, N) pixels of the scale space.
        valid: which of them are keypoints.
        place: where the keypoints are between these pixels.
        every: whether to repeat keypoints for each of their orientations, instead of taking the strongest.
        slots: the largest number of keypoints of an image then.
    """
    with torch.no_grad():
        angles, strength = peaks(space, extrema, place)
    if not every:
        strongest = angles.gather(-1, strength.argmax(-1, keepdim=True))[..., 0]
        return extrema, valid, place._replace(angle=strongest % math.tau)
    strength, chosen = strength.topk(MOST)
    angles = angles.gather(-1, chosen) % math.tau
    is_peak = strength > 0
    is_peak[..., 0] = True  # every keypoint keeps its strongest
    kept = (valid[..., None] & is_peak).flatten(1)
    order = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :slots]
    owner = order // MOST
    place = place.gather(owner)._replace(angle=angles.flatten(1).gather(1, order))
    return extrema.gather(owner), kept.gather(1, order), place


def peaks(
    space: ScaleSpace, extrema: Extrema, place: Place
) -> tuple[Annotated[Tensor, "B N 36"], Annotated[Tensor, "B N 36"]]:
    """The directions of the gradient around each keypoint that may be its orientation.

    Args:
        space: the scale space.
        extrema: (B, N) pixels of the scale space.
        place: where the keypoints are between these pixels.

    Returns:
        The angle at which each of 36 bins of the gradient's histogram peaks, in radians from the x axis towards the
        y axis, and the bin's strength relative to the strongest, which is 0 unless it is a peak of at least 80 % of it.
    """
    step = 2 * REACH / (ANGLE_SAMPLES - 1)
    magnitude, angle = _polar(*sample_gradients(space, extrema, place, upright(place), ANGLE_SAMPLES, step))
    axis = torch.linspace(-REACH, REACH, ANGLE_SAMPLES, device=angle.device, dtype=angle.dtype)
    window = torch.exp(axis.square() * (-0.5 / WINDOW**2))
    weight = magnitude * (window[:, None] * (window * ONE)).flatten()
    position = angle * (ANGLE_BINS / math.tau) % ANGLE_BINS
    lower = position.floor()
    upper = position - lower
    share = (torch.stack([1 - upper, upper], dim=2) * weight[:, :, None]).flatten(2).long()
    bins = torch.cat([lower, lower + 1], dim=-1).long() % ANGLE_BINS
    # Integers are summed, so that the order of the sum does not matter.
    histogram = torch.zeros_like(bins[..., :ANGLE_BINS]).scatter_add_(-1, bins, share).to(angle.dtype)
    around = _wrapped(histogram, 2)
    next_to, beyond = around[..., 1:-3] + around[..., 3:-1], around[..., :-4] + around[..., 4:]
    smooth = beyond.add(next_to, alpha=4).add(histogram, alpha=6)
    around = _wrapped(smooth, 1)
    left, right = around[..., :-2], around[..., 2:]
    strongest = smooth.amax(-1, keepdim=True)
    is_peak = (smooth > torch.maximum(left, right)) & (smooth >= 0.8 * strongest)
    curvature = torch.where(is_peak, (left + right).sub(smooth, alpha=2), 1.0)
    peak = torch.addcdiv(torch.arange(ANGLE_BINS, device=angle.device), left - right, curvature, value=0.5)
    return peak * (math.tau / ANGLE_BINS), torch.where(is_peak, smooth / strongest, 0.0)


def _wrapped(histogram: Annotated[Tensor, "... bins"], count: int) -> Annotated[Tensor, "... bins+2*count"]:
    """The histogram of a circle, with some of its bins again at either end."""
    return torch.cat([histogram[..., -count:], histogram, histogram[..., :count]], dim=-1)


def describe(space: ScaleSpace, extrema: Extrema, place: Place, *, root: bool) -> Annotated[Tensor, "B N 128"]:
    """Histograms of gradients, 8 directions in 4x4 cells along the keypoint's angle, in OpenCV's order.

    Args:
        space: the scale space.
        extrema: (B, N) pixels of it.
        place: where the keypoints are between these pixels, with their angles.
        root: RootSIFT instead of SIFT.
    """
    assert place.angle is not None, "orient() comes first"
    cosine, sine = place.angle.cos(), place.angle.sin()
    frame = torch.unflatten(torch.stack([cosine, -sine, sine, cosine], dim=-1), -1, (2, 2))
    magnitude, direction = _polar(*sample_gradients(space, extrema, place, frame, SAMPLES, spacing_of(SAMPLES)))
    weight = cell_weights(SAMPLES, place.scale)
    cells = torch.einsum("yi,xj->ijyx", weight, weight).flatten(2).flatten(0, 1)
    # OpenCV counts directions from the x axis away from the y axis. Bin 8 is bin 0 again.
    bins = torch.arange(DIRECTIONS + 1, device=weight.device, dtype=weight.dtype)[:, None]
    position = direction * (-DIRECTIONS / math.tau) % DIRECTIONS
    distance = (position[..., None, :] - bins).abs().clamp(max=1)
    directions = torch.addcmul(magnitude[..., None, :], magnitude[..., None, :], distance, value=-1)
    histogram = directions @ cells.T
    histogram = torch.cat([histogram[..., :1, :] + histogram[..., -1:, :], histogram[..., 1:-1, :]], dim=-2)
    return to_descriptor(histogram.mT.flatten(-2), root=root)


def _polar(
    du: Annotated[Tensor, "B N P"], dv: Annotated[Tensor, "B N P"]
) -> tuple[Annotated[Tensor, "B N P"], Annotated[Tensor, "B N P"]]:
    """The magnitude and the direction of each gradient; neither is differentiable where there is none."""
    square = torch.addcmul(du.square(), dv, dv)
    exists = square > 0
    return torch.where(exists, square, 1.0).sqrt() * exists, torch.atan2(dv, torch.where(exists, du, 1.0))
