"""What follows the first convolution where every pixel was computed."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaf_layer.diffusion.rows import wide

__all__ = ["normalise_and_convolve"]

Channels = Annotated[Tensor, "C"]


def normalise_and_convolve(
    pixels: Annotated[Tensor, "B C *S"],
    first_bias: Channels,
    norm: Any,
    weight: Annotated[Tensor, "O C *K"],
    bias: Annotated[Tensor, "O"],
) -> tuple[Annotated[Tensor, "B O *S"], Channels, Channels]:
    """Batch normalisation, ReLU and the second convolution; then the pixels' mean and inverse deviation, in training.

    Args:
        pixels: the first convolution, without its bias.
        first_bias: that bias.
        norm: the module of the normalisation. Its running averages are read outside of training, but not moved.
        weight: of the second convolution.
        bias: of the second convolution.
    """
    running = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    parameters = first_bias, norm.weight, norm.bias, weight, bias
    return _NormaliseAndConvolve.apply(pixels, *parameters, *running, norm.eps)


class _NormaliseAndConvolve(torch.autograd.Function):
    """Keeps nothing but the pixels for the backward pass: normalisation and ReLU are repeated there."""

    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        first_bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, ...]:
        """Pixels (B, C, H, W) to a map (B, O, H, W), normalised by moments, or by their own if there are none."""
        dtype = wide(pixels)
        scale, shift = scale.to(dtype), shift.to(dtype)
        if mean is not None and var is not None:
            mean, var = (mean - first_bias).to(dtype), var.to(dtype)  # the pixels lack the bias
        activated, *moments = _activate(pixels, scale, shift, mean, var, eps)
        ctx.save_for_backward(pixels, first_bias, scale, shift, weight, mean, var, *moments)
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)  # else zeros are made for the moments
        ctx.eps = eps
        convolve = F.conv2d if pixels.ndim == 4 else F.conv3d
        return convolve(activated, weight.to(pixels.dtype), bias.to(pixels.dtype), padding=1), *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_moments: None) -> tuple[Tensor | None, ...]:
        """The gradients of the pixels and of all parameters."""
        if grad is None:
            return (None,) * 9
        pixels, first_bias, scale, shift, weight, mean, var, *moments = ctx.saved_tensors
        training, ones, zeros = mean is None, [1] * (grad.ndim - 2), [0] * (grad.ndim - 2)
        activated = _activate(pixels, scale, shift, mean, var, ctx.eps)[0]
        grad, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, activated, weight.to(pixels.dtype), [weight.shape[0]], ones, ones, ones, False, zeros, 1, [True] * 3
        )
        grad = torch.ops.aten.threshold_backward(grad, activated, 0)
        grad, *gradients = torch.ops.aten.native_batch_norm_backward(
            grad, pixels, scale, mean, var, *moments, training, ctx.eps, [True] * 3
        )
        # What the first bias adds, the mean of a batch takes away.
        grad_first = torch.zeros_like(first_bias) if training else grad.transpose(0, 1).flatten(1).sum(1)
        gradients = [grad_first, *gradients, grad_weight, grad_bias]
        return grad, *(x.to(weight.dtype) for x in gradients), None, None, None


def _activate(
    pixels: Tensor, scale: Tensor, shift: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """The normalised and rectified pixels; then mean and inverse deviation of the batch, if by these."""
    normalised, *moments = torch.native_batch_norm(pixels, scale, shift, mean, var, mean is None, 0.0, eps)
    return normalised.relu_(), *moments
