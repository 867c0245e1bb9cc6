"""The second convolution of all pixels, where every pixel has its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaf_layer.diffusion.rows import Hidden, activate, activate_backward

__all__ = ["pixels_to_map"]


def pixels_to_map(hidden: Hidden, size: Sequence[int], layout: torch.memory_format) -> Annotated[Tensor, "B O *S"]:
    """Normalisation, ReLU and the second convolution.

    Args:
        hidden: with a row for each pixel of the batch, behind one that is not used.
        size: the map's size.
        layout: of the map.
    """
    return _PixelsToMap.apply(size, layout, *hidden)


class _PixelsToMap(torch.autograd.Function):
    """Keeps nothing but the rows for the backward pass: normalisation and ReLU are repeated there."""

    @staticmethod
    def forward(ctx: Any, size: Sequence[int], layout: torch.memory_format, *hidden: Tensor) -> Tensor:
        """Rows (B * H * W + 1, C) and a weight (O, C, 3, 3) to a map (B, O, H, W)."""
        rows, scale, shift, weight, bias = hidden
        ctx.save_for_backward(rows, scale, shift, weight)
        ctx.size, ctx.layout = size, layout
        convolve = F.conv2d if len(size) == 2 else F.conv3d
        activated = _to_map(activate(rows[1:], scale, shift), rows.dtype, size, layout)
        return convolve(activated, weight.to(rows.dtype), bias.to(rows.dtype), padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of what is hidden."""
        rows, scale, shift, weight = ctx.saved_tensors
        ones, zeros = [1] * len(ctx.size), [0] * len(ctx.size)
        activated = activate(rows[1:], scale, shift)
        inputs = _to_map(activated, rows.dtype, ctx.size, ctx.layout), weight.to(rows.dtype)
        grad_inputs, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, *inputs, [weight.shape[0]], ones, ones, ones, False, zeros, 1, [True] * 3
        )
        grad_activated = grad_inputs.movedim(1, -1).flatten(0, -2).to(activated.dtype)
        grad_rows, *gradients = activate_backward(grad_activated, activated, rows[1:], scale)
        gradients += [grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)]
        return None, None, F.pad(grad_rows, (0, 0, 1, 0)), *gradients


def _to_map(
    activated: Annotated[Tensor, "B*S C"], dtype: torch.dtype, size: Sequence[int], layout: torch.memory_format
) -> Annotated[Tensor, "B C *S"]:
    return activated.to(dtype).view(-1, *size, activated.shape[1]).movedim(-1, 1).contiguous(memory_format=layout)
