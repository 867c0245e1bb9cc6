"""The second convolution of all pixels, where every pixel has its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaf_layer.diffusion.rows import activate, activate_backward, wide

__all__ = ["pixels_to_map"]


def pixels_to_map(
    rows: Annotated[Tensor, "B*S+1 C"],
    scale: Annotated[Tensor, "C"],
    shift: Annotated[Tensor, "C"],
    weight: Annotated[Tensor, "O C *K"],
    bias: Annotated[Tensor, "O"],
    size: Sequence[int],
    layout: torch.memory_format,
) -> Annotated[Tensor, "B O *S"]:
    """``relu(rows * scale + shift)`` and the second convolution.

    Args:
        rows: one for each pixel of the batch, behind one that is not used.
        scale: of the normalisation.
        shift: of the normalisation.
        weight: of the convolution.
        bias: of the convolution.
        size: the map's size.
        layout: of the map.
    """
    return _PixelsToMap.apply(rows, scale, shift, weight, bias, size, layout)


class _PixelsToMap(torch.autograd.Function):
    """Keeps nothing but the rows for the backward pass: normalisation and ReLU are repeated there."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        size: Sequence[int],
        layout: torch.memory_format,
    ) -> Tensor:
        """Rows (B * H * W + 1, C) and a weight (O, C, 3, 3) to a map (B, O, H, W)."""
        ctx.save_for_backward(rows, scale, shift, weight)
        ctx.size, ctx.layout = size, layout
        convolve = F.conv2d if len(size) == 2 else F.conv3d
        hidden = _hidden_map(rows, scale, shift, size, layout)
        return convolve(hidden, weight.to(rows.dtype), bias.to(rows.dtype), padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the rows, scale, shift, weight and bias."""
        rows, scale, shift, weight = ctx.saved_tensors
        ones, zeros = [1] * len(ctx.size), [0] * len(ctx.size)
        hidden = _hidden_map(rows, scale, shift, ctx.size, ctx.layout)
        grad_hidden, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, hidden, weight.to(rows.dtype), [weight.shape[0]], ones, ones, ones, False, zeros, 1, [True] * 3
        )
        grad_hidden = F.pad(grad_hidden.movedim(1, -1).flatten(0, -2).to(wide(rows)), (0, 0, 1, 0))
        gradients = activate_backward(grad_hidden, rows, scale, shift)
        return *gradients, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def _hidden_map(
    rows: Annotated[Tensor, "B*S+1 C"],
    scale: Tensor,
    shift: Tensor,
    size: Sequence[int],
    layout: torch.memory_format,
) -> Annotated[Tensor, "B C *S"]:
    hidden = activate(rows[1:], scale, shift).to(rows.dtype)
    return hidden.view(-1, *size, rows.shape[1]).movedim(-1, 1).contiguous(memory_format=layout)
