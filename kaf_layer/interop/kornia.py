"""Keypoints to Kornia's local affine frames, for its matchers, descriptors and drawing; and back, of its detectors."""

from __future__ import annotations

import math
from typing import Annotated

import kornia.feature as KF
import torch
from torch import Tensor

from kaf_layer.checks import check_floats, check_keypoints
from kaf_layer.keypoints import Keypoints

__all__ = ["keypoints_from_lafs", "to_lafs"]

MAGNIFICATION = 6.0  # half the side of a SIFT patch, in blurs; Kornia's and OpenCV's convention


def to_lafs(keypoints: Keypoints, *, magnification: float = MAGNIFICATION) -> Annotated[Tensor, "B N 2 3"]:
    """Kornia's local affine frames of keypoints: matrices from a patch between -1 and 1 to the image, in ``(x, y)``.

    Kornia knows no padding. Slots that are not valid become frames of zeros, as its detectors mark slots that they did
    not fill. For what treats every frame alike, take the valid ones of a sample: ``lafs[i][keypoints.valid[i]]``.

    Args:
        keypoints: of images. Without ``scales`` they have scale 1, without ``angles`` angle 0.
        magnification: the frame's size, in scales. Kornia's detectors have 6 by default, as have OpenCV's keypoints in
            Kornia.

    Returns:
        (B, N, 2, 3), differentiable with respect to positions, scales and angles.

    Raises:
        TypeError: if keypoints are no ``Keypoints``.
        ValueError: if they are of volumes.

    Example:
        >>> keypoints = Keypoints(torch.tensor([[[8.0, 5.0], [0.0, 0.0]]]), torch.tensor([[True, False]]), (16, 24),
        ...                       scales=torch.tensor([[2.0, 0.0]]))
        >>> to_lafs(keypoints).abs()
        tensor([[[[12.,  0.,  8.],
                  [ 0., 12.,  5.]],
        <BLANKLINE>
                 [[ 0.,  0.,  0.],
                  [ 0.,  0.,  0.]]]])
    """
    check_keypoints(keypoints=keypoints)
    if keypoints.spatial_dims != 2:
        raise ValueError(f"keypoints must be of images, Kornia has no frames in volumes, got {keypoints.image_size=}")
    valid = keypoints.valid
    positions = keypoints.positions.where(valid[..., None], 0.0)
    zeros = torch.zeros_like(positions[..., 0])
    scales = zeros + 1 if keypoints.scales is None else keypoints.scales.where(valid, 1.0).to(positions.dtype)
    angles = zeros if keypoints.angles is None else keypoints.angles.where(valid, 0.0).to(positions.dtype)
    # Kornia counts degrees from the x axis against the y axis.
    orientation = -angles[..., None] * (180 / math.pi)
    lafs = KF.laf_from_center_scale_ori(positions, magnification * scales[..., None, None], orientation)
    return lafs.where(valid[..., None, None], 0.0)


def keypoints_from_lafs(
    lafs: Annotated[Tensor, "B N 2 3"],
    responses: Annotated[Tensor, "B N"] | None = None,
    *,
    image_size: tuple[int, int],
    descriptors: Annotated[Tensor, "B N K"] | None = None,
    magnification: float = MAGNIFICATION,
) -> Keypoints:
    """The keypoints of what Kornia's detectors return, such as ``KeyNetDetector`` and ``SIFTFeature``.

    Args:
        lafs: (B, N, 2, 3), local affine frames. Frames without an area, such as zeros, or that are not finite, become
            slots that are not valid.
        responses: (B, N), which become scores.
        image_size: of the images that were detected on, (H, W).
        descriptors: (B, N, K).
        magnification: the frame's size, in scales; 6 by default in Kornia's detectors.

    Returns:
        keypoints with scales and angles; of the frame's shape nothing remains but its area and orientation.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if the shapes do not fit.

    Example:
        >>> import kornia.feature as KF
        >>> detector = KF.ScaleSpaceDetector(num_features=8)
        >>> lafs, responses = detector(torch.rand(2, 1, 32, 48))
        >>> keypoints_from_lafs(lafs, responses, image_size=(32, 48)).positions.shape
        torch.Size([2, 8, 2])
    """
    check_floats(lafs=lafs)
    if lafs.ndim != 4 or lafs.shape[2:] != (2, 3):
        raise ValueError(f"lafs must be (B, N, 2, 3), got {lafs.shape=}")
    (a, b, _), (c, d, _) = (row.unbind(-1) for row in lafs.unbind(-2))
    valid = lafs.flatten(2).isfinite().all(-1) & (a * d != b * c)
    upright = torch.eye(2, 3, device=lafs.device, dtype=lafs.dtype)
    frames = torch.where(valid[..., None, None], lafs, upright)
    return Keypoints(
        KF.get_laf_center(frames),
        valid,
        image_size,
        scores=responses,
        scales=KF.get_laf_scale(frames)[..., 0, 0] / magnification,
        angles=-torch.deg2rad(KF.get_laf_orientation(frames)[..., 0]),
        descriptors=descriptors,
    )
