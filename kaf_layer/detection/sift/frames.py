"""The orientation of keypoints in a volume: the axes of the gradients around them (Rister et al. 2017, II-C)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.pyramid import ScaleSpace

__all__ = ["eigenvectors", "orient_in_space", "sample_gradients"]

SAMPLES, REACH, WINDOW = 9, 4.5, 1.5  # gradients within 3 times 1.5 scales, weighted by a Gaussian of 1.5 scales
SWEEPS = 6  # Jacobi's method converges quadratically: 3 sweeps give single, 5 double precision


def orient_in_space(space: ScaleSpace, extrema: Extrema, centre: Tensor, scale: Tensor) -> Annotated[Tensor, "B N 3 3"]:
    """A rotation for each keypoint, which rotates with the volume: its columns are three axes (x, y, z).

    The axes are the eigenvectors of the structure tensor, by descending eigenvalue. The mean gradient has no negative
    component along the first two, and the third makes the frame right-handed.

    Args:
        space: the scale space.
        extrema: (B, N) voxels of it.
        centre: (B, N, 3), the keypoints' ``(x, y, z)`` in their octaves.
        scale: (B, N), their scales in their octaves.
    """
    upright = torch.eye(3, dtype=scale.dtype, device=scale.device).expand(*scale.shape, 3, 3)
    step = 2 * REACH / (SAMPLES - 1)
    gradients = sample_gradients(space, extrema, centre, scale, upright, SAMPLES, step)
    axis = (torch.arange(SAMPLES, dtype=scale.dtype, device=scale.device) - (SAMPLES - 1) / 2) * step
    square = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    weighted = gradients * torch.exp(-square / (2 * WINDOW**2)).flatten()[:, None]
    axes = eigenvectors(weighted.mT @ gradients)
    along = (axes.mT @ weighted.sum(-2)[..., None]).mT
    first, second, _ = torch.where(along < 0, -axes, axes).unbind(-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)


def eigenvectors(matrix: Annotated[Tensor, "... 3 3"]) -> Annotated[Tensor, "... 3 3"]:
    """The eigenvectors of symmetric matrices as columns, by descending eigenvalue; by Jacobi's rotations.

    Torch's solver would wait for the device.
    """
    vectors = torch.eye(3, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    for _ in range(SWEEPS):
        for p, q in ((0, 1), (0, 2), (1, 2)):
            # The angle that makes the element (p, q) zero; atan2(0, 0) is 0.
            angle = 0.5 * torch.atan2(2 * matrix[..., p, q], matrix[..., p, p] - matrix[..., q, q])
            cosine, sine = angle.cos()[..., None], angle.sin()[..., None]
            columns = list(vectors.unbind(-1))
            columns[p], columns[q] = cosine * columns[p] + sine * columns[q], cosine * columns[q] - sine * columns[p]
            vectors = torch.stack(columns, dim=-1)
            rows = list(matrix.unbind(-2))
            rows[p], rows[q] = cosine * rows[p] + sine * rows[q], cosine * rows[q] - sine * rows[p]
            matrix = torch.stack(rows, dim=-2)
            columns = list(matrix.unbind(-1))
            columns[p], columns[q] = cosine * columns[p] + sine * columns[q], cosine * columns[q] - sine * columns[p]
            matrix = torch.stack(columns, dim=-1)
    order = matrix.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    return torch.take_along_dim(vectors, order[..., None, :], dim=-1)


def sample_gradients(
    space: ScaleSpace, extrema: Extrema, centre: Tensor, scale: Tensor, frame: Tensor, samples: int, step: float
) -> Annotated[Tensor, "B N S 3"]:
    """The gradients at ``samples`` ** 3 points around each keypoint, in the coordinates (u, v, w) of its frame.

    The points lie ``step`` scales apart in a cube along the columns of ``frame`` (B, N, 3, 3), u fastest. Outside
    the volume there is no gradient. Distances are physical; gradients are not divided by the step.
    """
    axis = (torch.arange(samples + 2, device=scale.device, dtype=scale.dtype) - (samples + 1) / 2) * step
    w, v, u = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = frame @ torch.stack([u, v, w]).flatten(1)
    points = points * (scale[..., None] / extrema.pitch.flip(-1))[..., None] + centre[..., None]
    patch, inside = (value.unflatten(-1, u.shape) for value in _sample(space, extrema, points))
    du = patch[..., 1:-1, 1:-1, 2:] - patch[..., 1:-1, 1:-1, :-2]
    dv = patch[..., 1:-1, 2:, 1:-1] - patch[..., 1:-1, :-2, 1:-1]
    dw = patch[..., 2:, 1:-1, 1:-1] - patch[..., :-2, 1:-1, 1:-1]
    gradients = torch.stack([du, dv, dw], dim=-1) * inside[..., 1:-1, 1:-1, 1:-1, None]
    return gradients.flatten(2, 4)


def _sample(
    space: ScaleSpace, extrema: Extrema, points: Annotated[Tensor, "B N 3 P"]
) -> tuple[Annotated[Tensor, "B N P"], Annotated[Tensor, "B N P"]]:
    """Trilinear samples of each extremum's own layer at ``(x, y, z)``, and which of them lie inside it."""
    depth, height, width = (size[..., None] for size in extrema.size.unbind(-1))
    x, y, z = points.unbind(2)
    inside = torch.ones_like(x, dtype=torch.bool)
    index = (extrema.pixel[..., :1] * extrema.size.prod(-1, keepdim=True)) + extrema.start[..., None]
    corners, fractions = [], []
    for position, size, stride in ((x, width, 1), (y, height, width), (z, depth, width * height)):
        inside = inside & (position >= 0) & (position <= size - 1)
        low = position.detach().floor().long().clamp(min=0).minimum(size - 2)
        index = index + low * stride
        corners.append(stride)
        fractions.append(position - low)
    _, row, plane = corners
    lines = [
        torch.lerp(space.take(start), space.take(start + 1), fractions[0])
        for start in (index, index + row, index + plane, index + plane + row)
    ]
    near, far = (torch.lerp(lines[i], lines[i + 1], fractions[1]) for i in (0, 2))
    return torch.lerp(near, far, fractions[2]), inside
