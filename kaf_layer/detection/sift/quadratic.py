"""The quadratic through an extremum's neighbourhood: peak, contrast and curvatures (Lowe 2004, section 4)."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

__all__ = ["FAR", "Fit", "fit_quadratic", "is_corner"]

FAR = 1e6  # outside any image; infinity would not survive the conversion to integers


class Fit(NamedTuple):
    """The quadratic through a neighbourhood of 3 pixels along each axis (Brown and Lowe 2002)."""

    value: Annotated[Tensor, "..."]
    gradient: Annotated[Tensor, "... A"]
    hessian: Annotated[Tensor, "... A A"]
    offset: Annotated[Tensor, "... A"]

    def step(self) -> Annotated[Tensor, "... A"]:
        """The offset of the peak, no farther than half a pixel along each axis."""
        return self.offset.clamp(-0.5, 0.5)

    def contrast(self) -> Annotated[Tensor, "..."]:
        """The value after that step, ``D + g . step / 2`` (Lowe 2004, equation 3)."""
        return self.value + 0.5 * (self.gradient * self.step()).sum(-1)


def fit_quadratic(cube: Tensor, axes: int) -> Fit:
    """Fits a quadratic to the values around a pixel (Lowe 2004, equations 2 and 3).

    The offset of its peak is ``-H^-1 g``, with the gradient g and the Hessian H from central differences. In volumes
    the layers and the space are solved separately. It is differentiable. Where H is singular the offset is FAR.

    Args:
        cube: (..., 3, ..., 3), with ``axes`` axes of 3.
        axes: A, the number of axes.
    """

    def line(*varied: int) -> Tensor:
        """The values at 3 places along these axes, and at the centre of the others."""
        return cube[(..., *(slice(None) if axis in varied else 1 for axis in range(axes)))]

    before, centre, after = torch.stack([line(axis) for axis in range(axes)], dim=-2).unbind(-1)
    gradient = (after - before) * 0.5
    pairs = list(combinations(range(axes), 2))
    squares = torch.stack([line(*pair) for pair in pairs], dim=-3)
    mixed = (squares[..., 2, 2] - squares[..., 2, 0] - squares[..., 0, 2] + squares[..., 0, 0]) / 4
    entries = dict(zip(pairs, mixed.unbind(-1), strict=True))
    entries |= {(axis, axis): x for axis, x in enumerate(torch.sub(after + before, centre, alpha=2).unbind(-1))}
    rows = [entries[min(i, j), max(i, j)] for i in range(axes) for j in range(axes)]
    hessian = torch.stack(rows, dim=-1).unflatten(-1, (axes, axes))
    if axes == 3:
        offset = -_solve(hessian, gradient)
    else:
        layer, space = _solve(hessian[..., :1, :1], gradient[..., :1]), _solve(hessian[..., 1:, 1:], gradient[..., 1:])
        offset = -torch.cat([layer, space], dim=-1)
    return Fit(centre[..., 0], gradient, hessian, offset)


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
        return trace**2 * r < (r + 1) ** 2 * determinant
    trace = diagonal.sum(-1)
    minors = sum(diagonal[..., i] * diagonal[..., j] - hessian[..., i, j] ** 2 for i, j in combinations(range(3), 2))
    a, b, c = hessian.unbind(-2)
    determinant = (a * torch.linalg.cross(b, c)).sum(-1)
    # Three real roots have one sign if the coefficients of their polynomial alternate or agree (Descartes).
    one_sign = (minors > 0) & (trace * determinant > 0)
    return one_sign & (trace.abs() ** 3 * r < (r + 2) ** 3 * determinant.abs())


def _solve(matrix: Annotated[Tensor, "... n n"], vector: Annotated[Tensor, "... n"]) -> Annotated[Tensor, "... n"]:
    """Cramer's rule for n = 1 or 3: fewer kernels than a factorisation, and what is singular is no error."""
    if matrix.shape[-1] == 1:
        cofactors, determinant = torch.ones_like(matrix), matrix[..., 0]
    else:
        cofactors = torch.linalg.cross(matrix.roll(-1, -2), matrix.roll(-2, -2))
        determinant = (matrix[..., 0, :] * cofactors[..., 0, :]).sum(-1, keepdim=True)
    regular = determinant != 0
    solution = (cofactors * vector[..., None]).sum(-2) / torch.where(regular, determinant, 1.0)
    return torch.where(regular, solution, FAR)
