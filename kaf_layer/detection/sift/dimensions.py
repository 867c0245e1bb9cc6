"""What differs between keypoints of images and of volumes, in one record for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kaf_layer.detection.sift import plane, volume
from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.pyramid import BORDER
from kaf_layer.detection.sift.refinement import Place

__all__ = ["DIMENSIONS", "Dimensions"]


@dataclass(frozen=True)
class Dimensions:
    """What differs between images and volumes.

    Args:
        axes: of a batch.
        smallest: the fewest pixels along an axis.
        too_small: what images with fewer are told.
        border: the number of pixels along the edge of every octave without keypoints.
        follow: whether extrema move to the pixel in which their quadratic peaks. In volumes they stay where they are:
            half of them would not settle, and the others are repeated less often.
        orient: gives keypoints their angles; None where only descriptors have an orientation.
        describe: computes their descriptors.
        upscale: the ways in which the first octave may be doubled.
        orientations: the choices of angles.
    """

    axes: str
    smallest: int
    too_small: str
    border: int
    follow: bool
    orient: Callable[..., tuple[Extrema, Tensor, Place]] | None
    describe: Callable[..., Tensor]
    upscale: tuple[str, ...] = ("precise",)
    orientations: tuple[str, ...] = ("strongest",)


PLANE = Dimensions(
    axes="(B, C, H, W)",
    smallest=BORDER + 1,  # doubled, an image of that size has pixels within the border
    too_small=f"images must have at least {BORDER + 1} x {BORDER + 1} pixels: the first octave, twice as large, has a "
    f"border of {BORDER} pixels without keypoints",
    border=BORDER,
    follow=True,
    orient=plane.orient,
    describe=plane.describe,
    upscale=("precise", "opencv"),
    orientations=("strongest", "all"),
)
SPACE = Dimensions(
    axes="(B, C, D, H, W)",
    smallest=3,  # an axis that is not doubled has a voxel with two neighbours
    too_small="volumes must have at least 3 voxels along every axis, as keypoints have neighbours; take slices as "
    "images, with spatial_dims=2",
    border=1,  # slices are few; a voxel needs its neighbours, no more
    follow=False,
    orient=None,
    describe=volume.describe,
)
DIMENSIONS = {2: PLANE, 3: SPACE}
