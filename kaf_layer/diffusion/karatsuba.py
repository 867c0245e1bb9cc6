"""Convolutions of 3^D patches by 3^D kernels to 5^D patches with 6^D multiplications in place of 9^D.

After Karatsuba and Ofman (1962): a product of polynomials needs fewer products of coefficients than their pairs,
if sums are multiplied too. All factors here are 1 and -1, so that little precision is lost (Winograd's choice, with
5^D multiplications, has larger factors and loses more).
"""

from __future__ import annotations

from functools import reduce
from typing import Annotated

import torch
from torch import Tensor

__all__ = ["karatsuba_matrices"]


def karatsuba_matrices(dims: int) -> tuple[Annotated[Tensor, "6^D 3^D"], Annotated[Tensor, "5^D 6^D"]]:
    """What patches and kernels are multiplied by before, and their products after.

    Args:
        dims: D, the number of axes.

    Example:
        >>> before, after = karatsuba_matrices(1)
        >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
        >>> after @ ((before @ a) * (before @ b))  # (1 + 2x + 3x^2) (4 + 5x + 6x^2)
        tensor([ 4., 13., 28., 27., 18.])
    """
    before = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]
    after = [
        [1, 0, 0, 0, 0, 0],
        [-1, -1, 0, 1, 0, 0],  # a0 b1 + a1 b0 = (a0 + a1) (b0 + b1) - a0 b0 - a1 b1
        [-1, 1, -1, 0, 1, 0],
        [0, -1, -1, 0, 0, 1],
        [0, 0, 1, 0, 0, 0],
    ]
    first, second = (reduce(torch.kron, [torch.tensor(rows, dtype=torch.float32)] * dims) for rows in (before, after))
    return first, second
