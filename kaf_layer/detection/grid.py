"""GridDetector: keypoints on a uniform grid."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Annotated

import torch
from torch import Tensor, nn

from kaf_layer.checks import check_tensors
from kaf_layer.keypoints import Keypoints

__all__ = ["GridDetector"]


class GridDetector(nn.Module):
    """Puts keypoints on a uniform grid, whatever the image shows, in any number of dimensions.

    An axis of ``size`` pixels gets ``n = max(1, round(size / spacing))`` keypoints at
    ``(i + 0.5) * size / n - 0.5``. They are evenly spaced, with half a step to either border. No slot is padding; to
    remove keypoints, for example those outside the body, use ``keypoints.keep(mask)``.

    Args:
        spacing: pixels between neighbours, one number or one for each axis in tensor order.

    Raises:
        ValueError: if a spacing is not positive.

    Example:
        >>> keypoints = GridDetector(spacing=(2, 4))(torch.zeros(1, 1, 2, 8))
        >>> keypoints.positions.tolist()
        [[[1.5, 0.5], [5.5, 0.5]]]
    """

    def __init__(self, spacing: float | Sequence[float]) -> None:
        super().__init__()
        # NumPy's numbers become Python's, which compilers treat as constants.
        self.spacing = (
            float(spacing) if isinstance(spacing, (int, float, Real)) else tuple(float(step) for step in spacing)
        )
        if min([self.spacing] if isinstance(self.spacing, float) else self.spacing, default=0) <= 0:
            raise ValueError(f"spacing must be positive, in pixels, got {spacing=}")

    def forward(self, images: Annotated[Tensor, "B C *S"]) -> Keypoints:
        """Returns the grid of every image, ``n_1 * ... * n_D`` keypoints in row-major order.

        Args:
            images: (B, C, *S). Only their shape, device and dtype matter; positions are at least float32.

        Raises:
            TypeError: if ``images`` is not a tensor.
            ValueError: if there is no spatial axis, or there are more or fewer axes than spacings.
        """
        check_tensors(images=images)
        size = images.shape[2:]
        spacing = (self.spacing,) * len(size) if isinstance(self.spacing, float) else self.spacing
        if not size or len(spacing) != len(size):
            raise ValueError(
                f"images must be (B, C, *S) with one axis for each spacing, got {images.shape=}, {spacing=}"
            )
        dtype = torch.promote_types(images.dtype, torch.float32)
        counts = [max(1, round(s / step)) for s, step in zip(size, spacing, strict=True)]
        axes = [
            (torch.arange(n, device=images.device, dtype=dtype) + 0.5) * (s / n) - 0.5
            for n, s in zip(counts, size, strict=True)
        ]
        grid = torch.stack([axis.flatten() for axis in reversed(torch.meshgrid(axes, indexing="ij"))], dim=-1)
        positions = grid.expand(images.shape[0], -1, -1)  # len() would make the batch size a constant under export
        valid = torch.ones(positions.shape[:2], dtype=torch.bool, device=images.device)
        return Keypoints(positions, valid, tuple(size), padded=False)

    def extra_repr(self) -> str:
        """The spacing."""
        return f"spacing={self.spacing}"
