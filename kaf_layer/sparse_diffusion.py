"""The diffusion network over rows: only pixels that differ from an empty map's are held, as (rows x channels) matrices.

The first convolution changes at most 3^D pixels around a keypoint, the second one 5^D; the others hold a constant.
A convolution of rows is one matrix product, and a sum over a table that says which rows lie around which; its gradient
is a lookup in the transposed table, and two matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaf_layer.sparse_tables import PixelTables, RowTables

__all__ = ["convolve_rows", "memory_format", "moments", "rows_to_map"]


def convolve_rows(
    tokens: Annotated[Tensor, "M C"], weight: Annotated[Tensor, "O C *K"], tables: RowTables
) -> Annotated[Tensor, "R+1 O"]:
    """The first convolution, without bias."""
    return _ConvolveRows.apply(tokens, weight, tables.tokens, tables.rows)


def moments(rows: Annotated[Tensor, "R+1 C"], pixels: int) -> tuple[Annotated[Tensor, "C"], Annotated[Tensor, "C"]]:
    """Mean and (biased) variance over so many pixels, of which those without a row are zero."""
    return _Moments.apply(rows, pixels)


def rows_to_map(
    rows: Annotated[Tensor, "R+1 C"],
    scale: Annotated[Tensor, "C"],
    shift: Annotated[Tensor, "C"],
    weight: Annotated[Tensor, "O C *K"],
    bias: Annotated[Tensor, "O"],
    features: Annotated[Tensor, "B F *S"] | None,
    tables: PixelTables,
    size: Sequence[int],
) -> Annotated[Tensor, "B F+O *S"]:
    """``relu(rows * scale + shift)`` and the second convolution, written after the features."""
    return _RowsToMap.apply(rows, scale, shift, weight, bias, features, tables.rows, tables.pixels, tables.cells, size)


def memory_format(features: Annotated[Tensor, "B F *S"] | None) -> torch.memory_format:
    """Channels last if the features have it, else contiguous."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if features is None or not features.is_contiguous(memory_format=channels_last[features.ndim]):
        return torch.contiguous_format
    return channels_last[features.ndim]


class _ConvolveRows(torch.autograd.Function):
    """A convolution without bias, from tokens to rows."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, table: Tensor, transposed: Tensor) -> Tensor:
        """Tokens (M, C) and a weight (O, C, 3, 3) to rows (R + 1, O)."""
        ctx.save_for_backward(tokens, weight, transposed)
        return _convolve(tokens, weight, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the tokens and of the weight."""
        return *_convolve_backward(grad, *ctx.saved_tensors), None, None


class _Moments(torch.autograd.Function):
    """Mean and variance over all pixels of a map, of which those without a row are zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
        """Rows (R + 1, C) and the number of pixels to (C,), (C,)."""
        wide = rows.to(_accumulation_dtype(rows))
        mean = wide.sum(0) / pixels
        var = ((wide - mean).square_().sum(0) + (pixels - rows.shape[0]) * mean.square()) / pixels
        ctx.save_for_backward(rows, mean)
        ctx.pixels = pixels
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None]:
        """The gradient of the rows."""
        rows, mean = ctx.saved_tensors
        return torch.addcmul(grad_mean - 2 * mean * grad_var, rows, 2 * grad_var).div_(ctx.pixels), None


class _RowsToMap(torch.autograd.Function):
    """Normalisation and ReLU of rows, and a convolution from rows to a map, which may follow ``features`` in it.

    Nothing but the rows is kept for the backward pass: normalisation and ReLU are repeated there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        features: Tensor | None,
        table: Tensor,
        transposed: Tensor,
        cells: Tensor,
        size: Sequence[int],
    ) -> Tensor:
        """Rows (R + 1, C), a weight (O, C, 3, 3) and features (B, F, H, W) to a map (B, F + O, H, W)."""
        hidden = _activate(rows, scale, shift, weight.dtype)
        values = _convolve(hidden, weight, table).add_(bias).view(*cells.shape, weight.shape[0])
        fused, diffused = _allocate(values, features, size)
        _fill(diffused, torch.einsum("oc...,c->o...", weight, hidden[0]), bias)
        pixels = diffused.view(*diffused.shape[:2], prod(size))
        pixels.scatter_(2, cells[:, None].expand_as(values.mT), values.mT.to(fused.dtype))
        ctx.save_for_backward(rows, scale, shift, weight, transposed, cells)
        ctx.features = 0 if features is None else features.shape[1]
        return fused

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the rows, scale, shift, weight, bias and features."""
        rows, scale, shift, weight, transposed, cells = ctx.saved_tensors
        grad_features = grad[:, : ctx.features] if ctx.features else None
        grad = grad[:, ctx.features :]
        hidden = _activate(rows, scale, shift, weight.dtype)
        background = hidden[0]

        # What the rows add to the background, ...
        grad_pixels = grad.flatten(2).gather(2, cells[:, None].expand(-1, grad.shape[1], -1)).mT.flatten(0, 1)
        grad_hidden, grad_weight = _convolve_backward(
            grad_pixels.to(weight.dtype), hidden[1:] - background, weight, transposed
        )
        # ... and the background, everywhere.
        sums = _fill_backward(grad)
        grad_hidden = grad_hidden.to(sums.dtype)
        grad_weight = grad_weight + torch.einsum("o...,c->oc...", sums, background.to(sums.dtype))
        grad_background = torch.einsum("oc...,o...->c", weight.to(sums.dtype), sums) - grad_hidden.sum(0)

        grad_hidden = torch.cat([grad_background[None], grad_hidden]).masked_fill_(hidden <= 0, 0.0)
        grad_scale, grad_shift = (grad_hidden * rows).sum(0), grad_hidden.sum(0)
        grad_bias = sums.flatten(1)[:, sums[0].numel() // 2]
        return grad_hidden * scale, grad_scale, grad_shift, grad_weight, grad_bias, grad_features, *[None] * 4


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _kernel(weight: Annotated[Tensor, "O C *S"]) -> Annotated[Tensor, "C K*O"]:
    return weight.flatten(2).permute(1, 2, 0).flatten(1)


def _convolve(
    rows: Annotated[Tensor, "M C"], weight: Annotated[Tensor, "O C *S"], table: Annotated[Tensor, "R K"]
) -> Annotated[Tensor, "R O"]:
    """Multiplies each row by the whole kernel, and sums by table; 0 stands for none, 1 for the first row."""
    products = _multiply(F.pad(rows, (0, 0, 1, 0)), _kernel(weight))
    positions = table.shape[1]
    index = table * positions + torch.arange(positions, dtype=table.dtype, device=table.device)
    return F.embedding_bag(index, products.view(-1, weight.shape[0]), mode="sum")


def _convolve_backward(
    grad: Annotated[Tensor, "R O"],
    rows: Annotated[Tensor, "M C"],
    weight: Annotated[Tensor, "O C *S"],
    table_t: Annotated[Tensor, "M K"],
) -> tuple[Annotated[Tensor, "M C"], Annotated[Tensor, "O C *S"]]:
    """The gradients of the rows and of the weight, from the same gathered rows."""
    gathered = (
        F.pad(grad, (0, 0, 1, 0))
        .index_select(0, table_t.flatten())
        .view(rows.shape[0], table_t.shape[1] * weight.shape[0])
    )
    grad_kernel = (rows.mT @ gathered).view(rows.shape[1], -1, weight.shape[0])
    return _multiply(gathered, _kernel(weight).mT), grad_kernel.permute(2, 0, 1).reshape(weight.shape)


def _multiply(a: Annotated[Tensor, "M C"], b: Annotated[Tensor, "C O"]) -> Annotated[Tensor, "M O"]:
    """The product ``a @ b``; for a CPU in single precision as a 1x1 convolution.

    Torch convolves with oneDNN, but multiplies matrices with MKL, which is less than half as fast on AMD's processors.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32 or torch.compiler.is_compiling() or not a.shape[0]:
        return a @ b
    images = 16  # from so many on, torch chooses oneDNN with any number of threads
    padded = F.pad(a, (0, 0, 0, -a.shape[0] % images)) if a.shape[0] % images else a
    pixels = padded.view(images, -1, 1, a.shape[1]).permute(0, 3, 1, 2)
    return F.conv2d(pixels, b.mT[..., None, None]).permute(0, 2, 3, 1).reshape(-1, b.shape[1])[: a.shape[0]]


def _activate(rows: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.addcmul(shift, rows, scale).relu_().to(dtype)


def _allocate(values: Tensor, features: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An uninitialised map, with the features copied into its first channels, and the view of the others."""
    batch, _, channels = values.shape
    if features is None:
        fused = values.new_empty((batch, channels, *size))
        return fused, fused
    fused = torch.empty(
        (batch, features.shape[1] + channels, *size),
        dtype=torch.promote_types(features.dtype, values.dtype),
        device=values.device,
        memory_format=memory_format(features),
    )
    fused[:, : features.shape[1]] = features
    return fused, fused[:, features.shape[1] :]


def _sides(dims: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The whole map, its borders and corners, as slices and with their signs in the inclusion-exclusion formula.

    The slices select, of the map, the pixels that lack neighbours, and of the kernel, the positions of these.
    """
    whole, first, last = slice(None), slice(0, 1), slice(-1, None)
    for sides in product((whole, first, last), repeat=dims):
        yield (-1) ** (dims - sides.count(whole)), sides


def _fill(out: Annotated[Tensor, "B O *S"], products: Annotated[Tensor, "O 3*"], bias: Annotated[Tensor, "O"]) -> None:
    """Writes the convolution of a constant map, whose products with the kernel's positions are given."""
    for sign, sides in _sides(out.ndim - 2):
        total = products[..., *sides].flatten(1).sum(1).view(-1, *[1] * len(sides))
        if sides.count(slice(None)) == len(sides):
            out.copy_(total + bias.view_as(total))
        else:
            out[..., *sides] += sign * total


def _fill_backward(grad: Annotated[Tensor, "B O *S"]) -> Annotated[Tensor, "O 3*"]:
    """For each of the kernel's positions the gradient summed over the pixels whose neighbour there is in the map."""
    dims = grad.ndim - 2
    sums = torch.zeros(grad.shape[1], *[3] * dims, dtype=_accumulation_dtype(grad), device=grad.device)
    for sign, sides in _sides(dims):
        side_sum = grad[..., *sides].sum((0, *range(2, grad.ndim)), dtype=sums.dtype)
        sums[..., *sides] += sign * side_sum.view(-1, *[1] * dims)
    return sums
