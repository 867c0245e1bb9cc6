"""From extrema to keypoints (Lowe 2004, section 4): move them to their peak, and reject weak ones and edges."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.pyramid import ScaleSpace
from kaf_layer.detection.sift.quadratic import fit_quadratic, is_corner

__all__ = ["Place", "locate", "refine"]

STEPS = 5  # an extremum that has not settled by then is rejected, as in OpenCV


def refine(
    space: ScaleSpace,
    extrema: Extrema,
    valid: Tensor,
    *,
    contrast_threshold: float,
    edge_threshold: float,
    follow: bool,
    static: bool,
) -> tuple[Extrema, Tensor, Tensor]:
    """Moves extrema to the pixel in which their quadratic peaks, and rejects weak ones and edges.

    Args:
        space: the scale space.
        extrema: the candidates of all images.
        valid: which of them are extrema.
        contrast_threshold: the least contrast, times the number of layers, in units of the image.
        edge_threshold: the largest ratio of the principal curvatures.
        follow: whether to move them; otherwise they stay where they are.
        static: whether to fit all candidates in every step, instead of only those that still move.

    Returns:
        The moved extrema, which of them are keypoints, and their response, the magnitude of the contrast.
    """
    stencil = extrema.stencil()
    if follow:
        extrema, valid = _follow(space, extrema, valid, stencil, static=static)
    result = fit_quadratic(_neighbourhood(space, extrema, stencil), space.derivatives)
    if follow:
        valid = valid & (result.offset.abs() < 0.5).all(-1)  # else it has not settled
    response = result.contrast().abs()
    # Curvatures per distance, not per pixel.
    pitch = extrema.pitch[..., None] * extrema.pitch[..., None, :]
    corner = is_corner(result.hessian[..., 1:, 1:] / pitch, edge_threshold)
    return extrema, valid & corner & (response * space.layers >= contrast_threshold), response


def _follow(
    space: ScaleSpace, extrema: Extrema, valid: Tensor, stencil: Tensor, *, static: bool
) -> tuple[Extrema, Tensor]:
    """Moves extrema to the pixel in which their quadratic peaks."""
    last = F.pad(extrema.size - (space.border + 1), (1, 0), value=space.layers)
    first = F.pad(torch.full_like(extrema.size, space.border), (1, 0), value=1)
    moving = None if static else torch.arange(valid.shape[1], device=valid.device)
    for _ in range(STEPS - 1):
        old, alive, around, low, high = extrema, valid, stencil, first, last
        if moving is not None:
            old = extrema.take(moving)
            alive, around, low, high = (values.index_select(1, moving) for values in (valid, stencil, first, last))
        target = old.pixel + fit_quadratic(_neighbourhood(space, old, around), space.derivatives).offset.round()
        alive = alive & (target.clamp(low, high) == target).all(-1)  # NaN equals nothing
        pixel = torch.where(alive[..., None], target, old.pixel).long()
        if moving is None:
            extrema, valid = extrema._replace(pixel=pixel), alive
        else:
            extrema = extrema._replace(pixel=extrema.pixel.index_copy(1, moving, pixel))
            valid = valid.index_copy(1, moving, alive)
            moving = moving[(pixel != old.pixel).any(-1)[0]]
    return extrema, valid


def _neighbourhood(space: ScaleSpace, extrema: Extrema, stencil: Tensor) -> Annotated[Tensor, "B M P"]:
    """The P differences of Gaussians around each pixel, 3 along every axis: (layer, y, x) or (layer, z, y, x)."""
    axes = extrema.pixel.shape[-1]
    values = space.take(extrema.position()[(..., *(None,) * axes)] + stencil)
    return values.diff(dim=-axes).flatten(-axes)


class Place(NamedTuple):
    """Where keypoints are in their octaves.

    Args:
        centre: ``(x, y)`` or ``(x, y, z)`` in pixels of the octave.
        scale: in pixels of the octave (of the finest axis).
        contrast: the value of the difference of Gaussians, of either sign.
        angle: in radians from the x axis towards the y axis; of images alone.
    """

    centre: Annotated[Tensor, "... D"]
    scale: Annotated[Tensor, "..."]
    contrast: Annotated[Tensor, "..."]
    angle: Annotated[Tensor, "..."] | None = None

    def gather(self, index: Annotated[Tensor, "B M"]) -> Place:
        """Of (B, N) keypoints those at ``index`` of each image, without their angles."""
        centre = self.centre.gather(1, index[..., None].expand(-1, -1, self.centre.shape[-1]))
        return Place(centre, self.scale.gather(1, index), self.contrast.gather(1, index))


def locate(space: ScaleSpace, extrema: Extrema, valid: Tensor) -> Place:
    """The positions of the keypoints between pixels, and their contrast.

    They are differentiable, and finite in slots that are not valid.
    """
    around = _neighbourhood(space, extrema, extrema.stencil()).where(valid[..., None], 0.0)
    peak = fit_quadratic(around, space.derivatives)
    place = extrema.pixel + peak.step()
    scale = space.sigma * 2 ** (place[..., 0] / space.layers)
    return Place(place[..., 1:].flip(-1), scale, peak.contrast())
