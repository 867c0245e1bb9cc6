"""Rows: only pixels that differ from an empty map's are held, as a (rows x channels) matrix.

The first convolution changes at most 3^D pixels around a keypoint; row 0 stands for all others, which are zero. It is
one matrix product, whose 3^D parts are added into the rows.

The arithmetic is in single precision at least: there is so little of it that half precision would gain nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaf_layer.linear import linear

__all__ = ["Hidden", "activate", "activate_backward", "convolve_tokens", "from_kernel", "moments", "to_kernel", "wide"]


class Hidden(NamedTuple):
    """What lies between the convolutions, and the second one: it takes ``relu(rows * scale + shift)``."""

    rows: Annotated[Tensor, "R+1 C"]
    scale: Annotated[Tensor, "C"]
    shift: Annotated[Tensor, "C"]
    weight: Annotated[Tensor, "O C *K"]
    bias: Annotated[Tensor, "O"]


def convolve_tokens(
    tokens: Annotated[Tensor, "M C"],
    weight: Annotated[Tensor, "O C *S"],
    rows: Annotated[Tensor, "M K"],
    *,
    count: int,
) -> Annotated[Tensor, "R+1 O"]:
    """The first convolution, without bias.

    Args:
        tokens: those of a cell are summed.
        weight: of the convolution, K = 3^D positions.
        rows: which rows lie around each token, see :func:`~kaf_layer.diffusion.neighbours.find_rows`.
        count: R, the number of rows beside row 0.
    """
    return _ConvolveTokens.apply(tokens, weight, rows, count)


def moments(rows: Annotated[Tensor, "R+1 C"], pixels: int) -> tuple[Annotated[Tensor, "C"], Annotated[Tensor, "C"]]:
    """Mean and (biased) variance over so many pixels, of which those without a row are zero."""
    return _Moments.apply(rows, pixels)


class _ConvolveTokens(torch.autograd.Function):
    """A convolution without bias, from tokens to rows."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, rows: Tensor, count: int) -> Tensor:
        """Tokens (M, C) and a weight (O, C, 3, 3) to rows (R + 1, O)."""
        ctx.save_for_backward(tokens, weight, rows)
        dtype = wide(tokens)
        products = linear(tokens.to(dtype), to_kernel(weight.to(dtype)).transpose(1, 2).flatten(0, 1))
        products = products.view(rows.numel(), weight.shape[0])
        result = products.new_zeros(count + 1, weight.shape[0])
        result.scatter_add_(0, rows.view(-1, 1).expand_as(products), products)
        result[0] = 0.0  # what fell outside the map
        return result.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tokens and of the weight."""
        tokens, weight, rows = ctx.saved_tensors
        dtype = wide(tokens)
        inside = F.pad(grad[1:].to(dtype), (0, 0, 1, 0))
        products = inside.index_select(0, rows.flatten()).view(rows.shape[0], rows.shape[1] * weight.shape[0])
        grad_kernel = linear(tokens.to(dtype).mT, products.mT).view(tokens.shape[1], rows.shape[1], -1).transpose(0, 1)
        kernel = to_kernel(weight.to(dtype)).transpose(0, 1).flatten(1)
        return linear(products, kernel).to(tokens.dtype), from_kernel(grad_kernel, weight), None, None


class _Moments(torch.autograd.Function):
    """Mean and variance over all pixels of a map, of which those without a row are zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
        """Rows (R + 1, C) and the number of pixels to (C,), (C,)."""
        values = rows.to(wide(rows))
        mean = values.sum(0) / pixels
        squares = (values - mean).square_().sum(0)
        var = torch.addcmul(squares, mean, mean, value=pixels - rows.shape[0]) / pixels
        ctx.save_for_backward(rows, mean)
        ctx.pixels = pixels
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None]:
        """The gradient of the rows."""
        rows, mean = ctx.saved_tensors
        slope = grad_var * (2 / ctx.pixels)
        return torch.addcmul(torch.addcmul(grad_mean / ctx.pixels, mean, slope, value=-1), rows, slope), None


def activate(
    rows: Annotated[Tensor, "R+1 C"], scale: Annotated[Tensor, "C"], shift: Annotated[Tensor, "C"]
) -> Annotated[Tensor, "R+1 C"]:
    """Normalised and rectified rows."""
    return torch.addcmul(shift, rows, scale).relu_()


def activate_backward(
    grad: Annotated[Tensor, "R+1 C"], rows: Annotated[Tensor, "R+1 C"], scale: Tensor, shift: Tensor
) -> tuple[Annotated[Tensor, "R+1 C"], Annotated[Tensor, "C"], Annotated[Tensor, "C"]]:
    """The gradients of the rows, scale and shift, from that of :func:`activate`."""
    grad = torch.ops.aten.threshold_backward(grad, activate(rows, scale, shift), 0)
    return (grad * scale).to(rows.dtype), (grad * rows).sum(0), grad.sum(0)


def wide(tensor: Tensor) -> torch.dtype:
    """The precision that is computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def to_kernel(weight: Annotated[Tensor, "O C *S"]) -> Annotated[Tensor, "K C O"]:
    """What a pixel gives to each pixel around it: the weight mirrored, as networks' convolutions are correlations."""
    return weight.flatten(2).permute(2, 1, 0).flip(0)


def from_kernel(kernel: Annotated[Tensor, "K C O"], weight: Annotated[Tensor, "O C *S"]) -> Annotated[Tensor, "O C *S"]:
    """The inverse of :func:`to_kernel`, for gradients."""
    return kernel.flip(0).permute(2, 1, 0).reshape(weight.shape).to(weight.dtype)
