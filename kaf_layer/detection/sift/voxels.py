"""Anisotropic pixels and voxels: which axes of the image are doubled, and the resulting scale space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from torch import Tensor

from kaf_layer.detection.sift.pyramid import FINE, ScaleSpace, double, scale_space

__all__ = ["Voxels"]

CAMERA_BLUR = 0.5  # the assumed blur of images, in their pixels


class Voxels(NamedTuple):
    """The shape of the image's pixels, in tensor order.

    Args:
        ratios: the distance between pixels along each axis, relative to the finest.
        factors: the factor, 2 or 1, by which each axis is enlarged before blurring; coarse axes are not.
        finest: the axis with the smallest distance.
    """

    ratios: tuple[float, ...]
    factors: tuple[int, ...]
    finest: int

    @staticmethod
    def spaced(spacing: Sequence[float] | None, spatial_dims: int) -> Voxels:
        """Makes voxels from distances in any unit; None means squares and cubes.

        Raises:
            ValueError: if they are not three positive numbers, or the image is not a volume.
        """
        distances = (1.0,) * spatial_dims if spacing is None else tuple(spacing)
        if (spacing is not None and spatial_dims != 3) or len(distances) != spatial_dims:
            raise ValueError(
                "spacing must be three distances (z, y, x) between the voxels of a volume, for spatial_dims=3, "
                f"got {spacing=} and {spatial_dims=}"
            )
        if not all(0 < distance < math.inf for distance in distances):
            raise ValueError(f"spacing must be positive and finite, got {spacing=}")
        finest = min(distances)
        ratios = tuple(distance / finest for distance in distances)
        return Voxels(ratios, tuple(2 if ratio < FINE else 1 for ratio in ratios), distances.index(finest))

    def scale_space(
        self,
        images: Annotated[Tensor, "B *S"],
        upscale: Literal["precise", "opencv"],
        *,
        layers: int,
        sigma: float,
        border: int,
    ) -> ScaleSpace:
        """The scale space of images that are doubled along the axes that are not coarse."""
        return scale_space(
            double(images, upscale, axes=[factor == 2 for factor in self.factors]),
            layers=layers,
            sigma=sigma,
            blurred=[factor * CAMERA_BLUR for factor in self.factors],
            pitch=[2 * ratio / factor for ratio, factor in zip(self.ratios, self.factors, strict=True)],
            border=border,
        )
