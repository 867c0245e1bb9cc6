"""The quadratic through an extremum's neighbourhood: peak, contrast and curvatures (Lowe 2004, section 4)."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

__all__ = ["Fit", "central_differences", "fit_quadratic", "is_corner"]

TINY = 1e-30  # stands for a determinant of 0, whose gradient would be infinite


class Fit(NamedTuple):
    """The quadratic through a neighbourhood of 3 pixels along each axis (Brown and Lowe 2002).

    Args:
        value: at the centre.
        downhill: the negative gradient there.
        hessian: the second derivatives.
        offset: of the peak from the centre.
    """

    value: Annotated[Tensor, "..."]
    downhill: Annotated[Tensor, "... A"]
    hessian: Annotated[Tensor, "... A A"]
    offset: Annotated[Tensor, "... A"]

    def step(self) -> Annotated[Tensor, "... A"]:
        """The offset of the peak, no farther than half a pixel along each axis."""
        return self.offset.clamp(-0.5, 0.5)

    def contrast(self) -> Annotated[Tensor, "..."]:
        """The value after that step, ``D + g . step / 2`` with the gradient g (Lowe 2004, equation 3)."""
        return torch.sub(self.value, (self.downhill * self.step()).sum(-1), alpha=0.5)


def central_differences(axes: int, like: Tensor) -> Annotated[Tensor, "3**A columns"]:
    """The matrix that turns a neighbourhood into its value, its negative gradient and the rows of its Hessian.

    The second-last and third-last rows of the Hessian are repeated at the end. So three views of the rows are the
    Hessian of the last three axes and that matrix with its rows moved up by one and by two.

    Args:
        axes: A, the number of axes, 3 or 4.
        like: a tensor of the device and type.
    """
    steps = torch.arange(-1.0, 2.0, device=like.device, dtype=like.dtype)
    square = steps.square()
    # By the number of derivatives along the axis: none, the first (downhill), the second.
    stencils = 1 - square, steps / -2, 3 * square - 2
    rows = [*range(axes), axes - 3, axes - 2]
    columns = [(), *((axis,) for axis in range(axes)), *((row, axis) for row in rows for axis in range(axes))]
    factors = [stencils[column.count(axis)] for axis in range(axes) for column in columns]
    matrix, *others = torch.unflatten(torch.stack(factors), 0, (axes, -1))
    for factor in others:
        matrix = (matrix[:, :, None] * factor[:, None]).flatten(1)
    return matrix.mT


def fit_quadratic(around: Annotated[Tensor, "... 3**A"], derivatives: Tensor) -> Fit:
    """Fits a quadratic to the values around a pixel (Lowe 2004, equations 2 and 3).

    The offset of its peak is ``-H^-1 g``, with the gradient g and the Hessian H from central differences. In volumes
    the layers and the space are solved separately. It is differentiable. Where H is singular the peak is far away,
    or at the centre if H has rank 0 or 1; neither is a keypoint.

    Args:
        around: the values, the last axis fastest.
        derivatives: what ``central_differences`` gives.
    """
    axes = 3 if derivatives.shape[0] == 3**3 else 4
    value, downhill, rows = (around @ derivatives).split([1, axes, (axes + 2) * axes], dim=-1)
    rows = torch.unflatten(rows, -1, (axes + 2, axes))
    # Cramer's rule: fewer kernels than a factorisation, and what is singular is no error.
    block = rows[..., axes - 3 :, axes - 3 :]
    cofactors = torch.linalg.cross(block[..., 1:4, :], block[..., 2:5, :])
    determinant = (block[..., 0, :] * cofactors[..., 0, :]).sum(-1, keepdim=True)
    offset = _divide((cofactors * downhill[..., axes - 3 :, None]).sum(-2), determinant)
    if axes == 4:
        offset = torch.cat([_divide(downhill[..., :1], rows[..., 0, :1]), offset], dim=-1)
    return Fit(value[..., 0], downhill, rows[..., :axes, :], offset)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; where the denominator is 0 it is far away, unless the numerator is 0 too."""
    return numerator / torch.where(denominator == 0, TINY, denominator)


def is_corner(hessian: Annotated[Tensor, "... D D"], edge_threshold: float) -> Annotated[Tensor, "..."]:
    """Whether the principal curvatures have one sign and similar magnitudes.

    In a plane they fail if their ratio is the threshold r or more: ``trace^2 / det < (r + 1)^2 / r``, the value of
    curvatures (r, 1) (Lowe 2004, section 4.1). In space ``trace^3 / det < (r + 2)^3 / r``, that of (r, 1, 1).
    """
    r = edge_threshold
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    if hessian.shape[-1] == 2:
        trace = diagonal[..., 0] + diagonal[..., 1]
        determinant = diagonal[..., 0] * diagonal[..., 1] - hessian[..., 0, 1] ** 2
        # A determinant of zero or less fails too.
        return trace.square() < (r + 1) ** 2 / r * determinant
    trace = diagonal.sum(-1)
    minors = sum(diagonal[..., i] * diagonal[..., j] - hessian[..., i, j] ** 2 for i, j in combinations(range(3), 2))
    a, b, c = hessian.unbind(-2)
    determinant = (a * torch.linalg.cross(b, c)).sum(-1)
    # Three real roots have one sign if the coefficients of their polynomial alternate or agree (Descartes).
    one_sign = (minors > 0) & (trace * determinant > 0)
    return one_sign & (trace.abs() ** 3 * r < (r + 2) ** 3 * determinant.abs())
