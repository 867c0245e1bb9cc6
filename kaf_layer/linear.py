"""Matrix products of tokens, at the full speed of AMD's processors too."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "linear"]


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`.

    Example:
        >>> Linear(8, 16)(torch.rand(2, 5, 8)).shape
        torch.Size([2, 5, 16])
    """

    def forward(self, input: Annotated[Tensor, "... C"]) -> Annotated[Tensor, "... O"]:  # torch's name for it
        """The weighted sums of the channels."""
        return linear(input, self.weight, self.bias)


def linear(
    x: Annotated[Tensor, "... C"], weight: Annotated[Tensor, "O C"], bias: Annotated[Tensor, "O"] | None = None
) -> Annotated[Tensor, "... O"]:
    """``torch.nn.functional.linear``; for a CPU in single precision as a 1x1 convolution.

    Torch convolves with oneDNN, but multiplies matrices with MKL, which is about half as fast on AMD's processors.

    Args:
        x: any number of tokens.
        weight: of each sum of channels.
        bias: of each sum.

    Example:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0]))
        tensor([[16.]])
    """
    if not _is_faster_as_convolution(x):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    # From 16 images on torch chooses oneDNN with any number of threads, for fewer only with several.
    images = 16 if rows.shape[0] % 16 == 0 else 1
    pixels = rows.unflatten(0, (images, 1, -1)).permute(0, 3, 1, 2)
    sums = F.conv2d(pixels, weight[..., None, None], bias)
    return sums.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _is_faster_as_convolution(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
