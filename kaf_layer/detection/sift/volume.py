"""Orientation and description of keypoints in volumes (Rister et al. 2017, II-C and II-D).

A keypoint's frame is given by the gradients around it. Its descriptor counts gradients towards the vertices of an
icosahedron.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.histograms import cell_weights, spacing_of, to_descriptor
from kaf_layer.detection.sift.patches import sample_gradients, upright
from kaf_layer.detection.sift.pyramid import ScaleSpace
from kaf_layer.detection.sift.refinement import Place

__all__ = ["describe", "eigenvectors", "orient"]

FRAME_SAMPLES, REACH, WINDOW = 9, 4.5, 1.5  # as in a plane
SWEEPS = 6  # Jacobi's method converges quadratically: 3 sweeps give single, 5 double precision
GOLDEN = (1 + math.sqrt(5)) / 2
NEAREST = 1 / math.sqrt(5)  # the cosine between neighbouring vertices
SAMPLES = 10


def describe(space: ScaleSpace, extrema: Extrema, place: Place, *, root: bool) -> Annotated[Tensor, "B N 768"]:
    """Histograms of gradients, 12 directions in 4x4x4 cells along the frame of each keypoint.

    The directions are the vertices of an icosahedron. A gradient counts towards each of them by how much smaller the
    angle between them is than that of two vertices, and not by its place in a triangle of vertices as in the paper.

    Args:
        space: the scale space.
        extrema: (B, N) voxels of it.
        place: where the keypoints are between these voxels.
        root: the root of the histogram, as in RootSIFT.
    """
    with torch.no_grad():
        frame = orient(space, extrema, place)
    gradients = torch.stack(sample_gradients(space, extrema, place, frame, SAMPLES, spacing_of(SAMPLES)), dim=-1)
    weight = cell_weights(SAMPLES, place.scale)
    cells = torch.einsum("zi,yj,xk->ijkzyx", weight, weight, weight).flatten(3).flatten(0, 2)
    square = gradients.square().sum(-1, keepdim=True)
    # The root has no gradient where there is none.
    magnitude = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    along = F.relu(gradients @ _vertices(place.scale).mT - NEAREST * magnitude)
    return to_descriptor((cells @ along).flatten(-2), root=root)


def orient(space: ScaleSpace, extrema: Extrema, place: Place) -> Annotated[Tensor, "B N 3 3"]:
    """A rotation for each keypoint, which rotates with the volume: its columns are three axes (x, y, z).

    The axes are the eigenvectors of the structure tensor, by descending eigenvalue. The mean gradient has no negative
    component along the first two, and the third makes the frame right-handed.

    Args:
        space: the scale space.
        extrema: (B, N) voxels of it.
        place: where the keypoints are between these voxels.
    """
    scale, step = place.scale, 2 * REACH / (FRAME_SAMPLES - 1)
    gradients = torch.stack(sample_gradients(space, extrema, place, upright(place), FRAME_SAMPLES, step), dim=-1)
    axis = (torch.arange(FRAME_SAMPLES, dtype=scale.dtype, device=scale.device) - (FRAME_SAMPLES - 1) / 2) * step
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


def _vertices(like: Tensor) -> Annotated[Tensor, "12 3"]:
    """The directions from an icosahedron's centre to its vertices: (0, 1, golden ratio) with all signs, in a cycle."""
    index = torch.arange(12, device=like.device)  # computed on the device, because copying constants would make it wait
    first, second = 1.0 - 2 * (index % 2), GOLDEN * (1.0 - 2 * (index // 2 % 2))
    points = torch.stack([torch.zeros_like(first), first, second], dim=-1).to(like.dtype)
    turned = (torch.arange(3, device=like.device) - index[:, None] // 4) % 3
    return F.normalize(points.gather(1, turned), dim=-1)
