"""The descriptor of keypoints in a volume: histograms of gradients over an icosahedron (Rister et al. 2017, II-D)."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.frames import orient_in_space, sample_gradients
from kaf_layer.detection.sift.pyramid import ScaleSpace

__all__ = ["describe_in_space"]

GOLDEN = (1 + math.sqrt(5)) / 2
NEAREST = 1 / math.sqrt(5)  # the cosine between neighbouring vertices
CELLS, SAMPLES = 4, 10
CELL = 3.0  # the side of a cell in scales, as in a plane


def describe_in_space(
    space: ScaleSpace, extrema: Extrema, centre: Tensor, scale: Tensor, *, root: bool
) -> Annotated[Tensor, "B N 768"]:
    """Histograms of gradients, 12 directions in 4x4x4 cells along the frame of each keypoint.

    The directions are the vertices of an icosahedron. A gradient counts towards each of them by how much smaller the
    angle between them is than that of two vertices, and not by its place in a triangle of vertices as in the paper.

    Args:
        space: the scale space.
        extrema: (B, N) voxels of it.
        centre: (B, N, 3), the keypoints' ``(x, y, z)`` in their octaves.
        scale: (B, N), their scales in their octaves.
        root: the root of the histogram (RootSIFT, Arandjelovic and Zisserman 2012); of length 1 as well.
    """
    with torch.no_grad():
        frame = orient_in_space(space, extrema, centre, scale)
    # Samples lie up to half a cell outside the cells, where their weight ends.
    side = CELLS + 1
    gradients = sample_gradients(space, extrema, centre, scale, frame, SAMPLES, CELL * side / SAMPLES)
    axis = (torch.arange(SAMPLES, device=scale.device, dtype=scale.dtype) + 0.5) * (side / SAMPLES) - side / 2
    cell = torch.arange(CELLS, device=scale.device, dtype=scale.dtype) - (CELLS - 1) / 2
    weight = F.relu(1 - (axis[:, None] - cell).abs()) * torch.exp(-(axis[:, None] ** 2) / (CELLS**2 / 2))
    cells = torch.einsum("zi,yj,xk->ijkzyx", weight, weight, weight).flatten(3).flatten(0, 2)
    square = gradients.square().sum(-1, keepdim=True)
    # The root has no gradient where there is none.
    magnitude = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    along = F.relu(gradients @ _vertices(scale).mT - NEAREST * magnitude)
    values = F.normalize((cells @ along).flatten(-2), dim=-1).clamp(max=0.2)
    if root:
        # A root's gradient at 0 is infinite.
        return F.normalize(values, p=1, dim=-1).clamp(min=1e-8).sqrt()
    return F.normalize(values, dim=-1)


def _vertices(like: Tensor) -> Annotated[Tensor, "12 3"]:
    """The directions from an icosahedron's centre to its vertices: (0, 1, golden ratio) with all signs, in a cycle."""
    index = torch.arange(12, device=like.device)  # computed on the device, because copying constants would make it wait
    first, second = 1.0 - 2 * (index % 2), GOLDEN * (1.0 - 2 * (index // 2 % 2))
    points = torch.stack([torch.zeros_like(first), first, second], dim=-1).to(like.dtype)
    turned = (torch.arange(3, device=like.device) - index[:, None] // 4) % 3
    return F.normalize(points.gather(1, turned), dim=-1)
