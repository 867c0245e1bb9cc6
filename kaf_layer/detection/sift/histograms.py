"""What the descriptors of images and volumes share: the cells of their histograms, and the last steps."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CELLS", "cell_weights", "spacing_of", "to_descriptor"]

CELLS = 4  # along every axis
CELL = 3.0  # the side of a cell in scales, as in OpenCV
SIDE = CELLS + 1  # in cells: samples lie up to half a cell outside the cells, where their weight ends


def spacing_of(samples: int) -> float:
    """The distance, in scales, between so many samples along an axis."""
    return CELL * SIDE / samples


def cell_weights(samples: int, like: Tensor) -> Annotated[Tensor, "samples CELLS"]:
    """The weight of each sample in each cell along an axis: linear between cells, times a Gaussian window."""
    last = (SIDE - SIDE / samples) / 2
    axis = torch.linspace(-last, last, samples, device=like.device, dtype=like.dtype)[:, None]
    cell = torch.linspace((1 - CELLS) / 2, (CELLS - 1) / 2, CELLS, device=like.device, dtype=like.dtype)
    return F.relu(1 - (axis - cell).abs()) * torch.exp(axis.square() * (-2 / CELLS**2))


def to_descriptor(histogram: Annotated[Tensor, "... K"], *, root: bool) -> Annotated[Tensor, "... K"]:
    """Clamps the normalised histogram (Lowe 2004, section 6.1), and normalises it again.

    Args:
        histogram: (..., K), not negative.
        root: RootSIFT (Arandjelovic and Zisserman 2012) instead of SIFT; of length 1 as well.
    """
    values = F.normalize(histogram, dim=-1).clamp(max=0.2)
    if root:
        # A root's gradient at 0 is infinite.
        return F.normalize(values, p=1, dim=-1).clamp(min=1e-8).sqrt()
    return F.normalize(values, dim=-1)
