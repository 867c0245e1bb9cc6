"""Matrix products of tokens, at the full speed of AMD's processors too."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "linear", "linear_backward"]


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
    sums = F.conv2d(_as_images(x.flatten(0, -2)), weight[..., None, None], bias)
    return _as_rows(sums).view(*x.shape[:-1], weight.shape[0])


def linear_backward(
    grad: Annotated[Tensor, "M O"], x: Annotated[Tensor, "M C"], weight: Annotated[Tensor, "O C"]
) -> tuple[Annotated[Tensor, "M C"], Annotated[Tensor, "O C"]]:
    """The gradients of a product's factors, for layers whose backward pass is written out.

    Args:
        grad: of the sums of channels.
        x: the tokens.
        weight: of each sum.

    Example:
        >>> x, weight = torch.rand(5, 3), torch.rand(2, 3)
        >>> [gradient.shape for gradient in linear_backward(torch.rand(5, 2), x, weight)]
        [torch.Size([5, 3]), torch.Size([2, 3])]
    """
    if not _is_faster_as_convolution(x):
        return grad @ weight, grad.mT @ x
    images, kernel, ones, zeros = (_as_images(grad), _as_images(x)), weight[..., None, None], [1, 1], [0, 0]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *images, kernel, None, ones, zeros, ones, False, zeros, 1, [True, True, False]
    )
    return _as_rows(grad_x), grad_weight[..., 0, 0]


def _as_images(rows: Annotated[Tensor, "M C"]) -> Annotated[Tensor, "B C 1 W"]:
    # From 16 images on torch chooses oneDNN with any number of threads, for fewer only with several.
    images = 16 if rows.shape[0] % 16 == 0 else 1
    return rows.unflatten(0, (images, 1, -1)).permute(0, 3, 1, 2)


def _as_rows(images: Annotated[Tensor, "B C 1 W"]) -> Annotated[Tensor, "M C"]:
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


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
