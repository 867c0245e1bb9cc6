"""Rows: only pixels that differ from an empty map's are held, as a (rows x channels) matrix.

The first convolution changes at most 3^D pixels around a keypoint; row 0 stands for all others, which are zero. It is
one matrix product, whose 3^D parts are added into the rows. Where the keypoints are many, every pixel has its row.

The arithmetic is in single precision at least: there is so little of it that half precision would gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaf_layer.linear import linear, linear_backward

__all__ = [
    "Hidden",
    "Tokens",
    "activate",
    "activate_backward",
    "convolve_tokens",
    "convolve_tokens_to_map",
    "from_kernel",
    "normalisation",
    "to_kernel",
    "wide",
]


class Tokens(NamedTuple):
    """The tokens of all samples, which of them are valid (all if None), and what they are multiplied by."""

    values: Annotated[Tensor, "M C"]
    valid: Annotated[Tensor, "M"] | None
    shares: Annotated[Tensor, "M C"]  # 0 where not valid


class Hidden(NamedTuple):
    """What lies between the convolutions, and the second one: it takes ``relu(rows * scale + shift)``."""

    rows: Annotated[Tensor, "R+1 C"]
    scale: Annotated[Tensor, "C"]
    shift: Annotated[Tensor, "C"]
    weight: Annotated[Tensor, "O C *K"]
    bias: Annotated[Tensor, "O"]


def convolve_tokens(
    tokens: Tokens,
    weight: Annotated[Tensor, "O C *S"],
    rows: Annotated[Tensor, "M K"],
    *,
    count: int,
) -> Annotated[Tensor, "R+1 O"]:
    """The first convolution, without bias; row 0 is zero.

    Args:
        tokens: those of a cell are summed, weighted by their shares.
        weight: of the convolution, K = 3^D positions.
        rows: which rows lie around each token, see :func:`~kaf_layer.diffusion.neighbours.find_rows`.
        count: R, the number of rows beside row 0.
    """
    return _ConvolveTokens.apply(*tokens, weight, rows, (1 + count,))


def convolve_tokens_to_map(
    tokens: Tokens,
    weight: Annotated[Tensor, "O C *K"],
    pixels: Annotated[Tensor, "M K"],
    *,
    batch: int,
    size: Sequence[int],
) -> Annotated[Tensor, "B O *S"]:
    """The first convolution, without bias, at every pixel.

    Args:
        tokens: those of a cell are summed, weighted by their shares.
        weight: of the convolution, K = 3^D positions.
        pixels: around each token, see :func:`~kaf_layer.diffusion.neighbours.padded_neighbours`.
        batch: B, the number of maps.
        size: of a map.
    """
    return _ConvolveTokens.apply(*tokens, weight, pixels, (batch, *(length + 2 for length in size)))


def normalisation(
    rows: Annotated[Tensor, "R+1 C"], conv_bias: Tensor, weight: Tensor, bias: Tensor, *, pixels: int, eps: float
) -> tuple[Annotated[Tensor, "C"], Annotated[Tensor, "C"], Annotated[Tensor, "C"], Annotated[Tensor, "C"]]:
    """Batch normalisation as a factor and a summand for rows, then the batch's mean and biased variance.

    Args:
        rows: the first convolution, without its bias.
        conv_bias: that bias, which is no more than a part of the mean.
        weight: of the normalisation.
        bias: of the normalisation.
        pixels: over so many, of which those without a row are zero.
        eps: added to the variance.
    """
    return _Normalisation.apply(rows, conv_bias, weight, bias, pixels, eps)


class _ConvolveTokens(torch.autograd.Function):
    """A convolution without bias, from tokens to rows, or to maps."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        valid: Tensor | None,
        shares: Tensor,
        weight: Tensor,
        rows: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Tokens (M, C) and a weight (O, C, 3, 3) to R + 1 rows, or to maps of B x (H + 2) x (W + 2), then cut."""
        tokens = tokens if valid is None else tokens.where(valid[:, None], 0.0)
        tokens = tokens * shares.to(tokens.dtype)
        ctx.save_for_backward(tokens, shares, weight, rows)
        ctx.to_map = len(shape) > 1
        dtype = wide(tokens)
        products = linear(tokens.to(dtype), _to_matrix(weight.to(dtype))).view(rows.numel(), weight.shape[0])
        result = products.new_zeros(prod(shape), weight.shape[0])
        result.scatter_add_(0, rows.view(-1, 1).expand_as(products), products)
        if not ctx.to_map:
            result[0] = 0.0  # what fell outside the map
            # A view, as torch 2.11 compiles no gradient for a result that .to() returned as it was.
            return result.to(tokens.dtype).view_as(result)
        inside = (slice(None), *[slice(1, -1)] * (len(shape) - 1))
        # Channels first: with channels last, torch loses precision in a CPU's batch statistics.
        pixels = result.view(*shape, weight.shape[0])[inside].movedim(-1, 1)
        return pixels.to(tokens.dtype, memory_format=torch.contiguous_format, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tokens and of the weight."""
        tokens, shares, weight, rows = ctx.saved_tensors
        dtype = wide(tokens)
        if ctx.to_map:
            grad = F.pad(grad.movedim(1, -1), (0, 0, *[1] * 2 * (grad.ndim - 2))).flatten(0, -2)
        else:
            grad = F.pad(grad[1:], (0, 0, 1, 0))
        products = grad.to(dtype).index_select(0, rows.flatten()).view(rows.shape[0], rows.shape[1] * grad.shape[1])
        grad_tokens, grad_matrix = linear_backward(products, tokens.to(dtype), _to_matrix(weight.to(dtype)))
        grad_kernel = grad_matrix.unflatten(0, (rows.shape[1], -1)).mT
        return (grad_tokens * shares).to(tokens.dtype), None, None, from_kernel(grad_kernel, weight), None, None


class _Normalisation(torch.autograd.Function):
    """Written out because autograd would issue twice as many operations, each on a handful of numbers."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, pixels: int, eps: float
    ) -> tuple[Tensor, ...]:
        """Rows (R + 1, C) and the parameters (C,) to four times (C,)."""
        values = rows.to(wide(rows))
        mean = values.sum(0) / pixels  # torch.var_mean is twenty times as slow on a CPU
        squares = (values - mean).square_().sum(0)
        var = torch.addcmul(squares, mean, mean, value=pixels - rows.shape[0]) / pixels
        inverse_std = torch.rsqrt(var + eps)
        scale = weight * inverse_std
        ctx.save_for_backward(rows, mean, inverse_std, scale, weight)
        ctx.set_materialize_grads(False)  # else zeros are made for the moments
        ctx.pixels = pixels
        moments = mean + conv_bias, var
        ctx.mark_non_differentiable(*moments)
        return scale, torch.addcmul(bias, mean, scale, value=-1), *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """The gradients of the rows and of the parameters."""
        rows, mean, inverse_std, scale, weight = ctx.saved_tensors
        grad_weight = torch.addcmul(grad_scale, mean, grad_shift, value=-1) * inverse_std
        slope = grad_weight * inverse_std * scale
        level = torch.addcmul(mean * slope, grad_shift, scale, value=-1) / ctx.pixels
        grad_rows = torch.addcmul(level, rows, slope, value=-1 / ctx.pixels)
        # What a convolution's bias adds, the mean takes away.
        gradients = torch.zeros_like(weight), grad_weight.to(weight.dtype), grad_shift.to(weight.dtype)
        return grad_rows.to(rows.dtype), *gradients, None, None


def activate(
    rows: Annotated[Tensor, "R+1 C"], scale: Annotated[Tensor, "C"], shift: Annotated[Tensor, "C"]
) -> Annotated[Tensor, "R+1 C"]:
    """Normalised and rectified rows."""
    return torch.addcmul(shift, rows, scale).relu_()


def activate_backward(
    grad: Annotated[Tensor, "R C"],
    activated: Annotated[Tensor, "R C"],
    rows: Annotated[Tensor, "R C"],
    scale: Annotated[Tensor, "C"],
) -> tuple[Annotated[Tensor, "R C"], Annotated[Tensor, "C"], Annotated[Tensor, "C"]]:
    """The gradients of the rows, scale and shift, from that of :func:`activate` and its result."""
    grad = torch.ops.aten.threshold_backward(grad, activated, 0)
    return (grad * scale).to(rows.dtype), (grad * rows).sum(0), grad.sum(0)


def wide(tensor: Tensor) -> torch.dtype:
    """The precision that is computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def to_kernel(weight: Annotated[Tensor, "O C *S"]) -> Annotated[Tensor, "K C O"]:
    """A matrix for each position."""
    return weight.flatten(2).permute(2, 1, 0)


def _to_matrix(weight: Annotated[Tensor, "O C *S"]) -> Annotated[Tensor, "K*O C"]:
    """The matrices of all positions in one."""
    return to_kernel(weight).transpose(1, 2).flatten(0, 1)


def from_kernel(kernel: Annotated[Tensor, "K C O"], weight: Annotated[Tensor, "O C *S"]) -> Annotated[Tensor, "O C *S"]:
    """The inverse of :func:`to_kernel`, for gradients."""
    return kernel.permute(2, 1, 0).reshape(weight.shape).to(weight.dtype)
