"""The second convolution around the keypoints: of a keypoint's 3^D rows it makes a patch of 5^D pixels.

The patches are added into what the convolution of an empty map would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kaf_layer.diffusion.background import fill, fill_backward
from kaf_layer.diffusion.rows import Hidden, activate, activate_backward, from_kernel, to_kernel, wide

__all__ = ["memory_format", "rows_to_map"]


def rows_to_map(
    hidden: Hidden,
    features: Annotated[Tensor, "B F *S"] | None,
    near: tuple[Annotated[Tensor, "5^D B N"], Annotated[Tensor, "5^D B N"]],
    matrices: tuple[Annotated[Tensor, "6^D 3^D"], Annotated[Tensor, "5^D 6^D"], Annotated[Tensor, "3^D 3^D"]],
    size: Sequence[int],
    layout: torch.memory_format,
) -> Annotated[Tensor, "B F+O *S"]:
    """Normalisation, ReLU and the second convolution, written after the features.

    Args:
        hidden: with K rows for each keypoint, as :func:`~kaf_layer.diffusion.rows.convolve_tokens` gives them.
        features: a map that the result follows, channel after channel.
        near: the cells around each keypoint, as :func:`~kaf_layer.diffusion.neighbours.find_neighbours` gives them.
        matrices: those of :func:`~kaf_layer.diffusion.karatsuba.karatsuba_matrices`, then
            :func:`~kaf_layer.diffusion.background.border_matrix`.
        size: the map's size.
        layout: of the result.
    """
    return _RowsToMap.apply(features, *near, *matrices, size, layout, *hidden)


def memory_format(features: Annotated[Tensor, "B F *S"] | None) -> torch.memory_format:
    """Channels last if the features have it, else contiguous."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if features is None or not features.is_contiguous(memory_format=channels_last[features.ndim]):
        return torch.contiguous_format
    return channels_last[features.ndim]


class _RowsToMap(torch.autograd.Function):
    """Normalisation and ReLU of rows, and a convolution from rows to a map, which may follow ``features`` in it.

    Nothing but the rows is kept for the backward pass: normalisation and ReLU are repeated there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor | None,
        index: Tensor,
        inside: Tensor,
        before: Tensor,
        after: Tensor,
        borders: Tensor,
        size: Sequence[int],
        layout: torch.memory_format,
        *hidden: Tensor,
    ) -> Tensor:
        """Rows (9 * B * N + 1, C), a weight (O, C, 3, 3) and features (B, F, H, W) to a map (B, F + O, H, W)."""
        rows, scale, shift, weight, bias = hidden
        ctx.save_for_backward(rows, scale, shift, weight, index.int(), inside, before, after, borders)
        ctx.features = 0 if features is None else features.shape[1]
        before, after, borders, kernel = (x.to(wide(rows)) for x in (before, after, borders, to_kernel(weight)))
        background, spectra = _spectra(rows, scale, shift, before)
        spectra = _combine(before, kernel).mT @ spectra.mT
        patches = after @ spectra.unflatten(2, index.shape[1:]).permute(1, 2, 0, 3)
        patches *= inside.transpose(0, 1)

        dtype = rows.dtype if features is None else torch.promote_types(features.dtype, rows.dtype)
        shape = (index.shape[1], ctx.features + weight.shape[0], *size)
        fused = torch.empty(shape, dtype=dtype, device=rows.device, memory_format=layout)
        diffused = fused[:, ctx.features :]
        fill(diffused, background, weight, bias, borders)
        pixels, patches = _by_sample(index, channels=weight.shape[0]), patches.transpose(0, 1).flatten(2)
        diffused.view(*diffused.shape[:2], -1).scatter_add_(2, pixels, patches.to(dtype))
        if features is not None:
            fused[:, : ctx.features] = features
        # torch 2.11 compiles no gradient for a tensor that was filled in place, but does for its copy, which takes no
        # kernel of its own. (A view would do, but what follows could not work in place then, as many a ReLU does.)
        return fused.clone() if torch.compiler.is_compiling() else fused

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the features and of what is hidden."""
        rows, scale, shift, weight, index, inside, before, after, borders = ctx.saved_tensors
        grad_features, grad = grad[:, : ctx.features] if ctx.features else None, grad[:, ctx.features :]
        before, after, borders, kernel = (x.to(wide(rows)) for x in (before, after, borders, to_kernel(weight)))
        # What the rows add to the background, ...
        patches = grad.flatten(2).gather(2, _by_sample(index.long(), channels=grad.shape[1])).to(wide(rows))
        patches = patches.unflatten(2, index.shape[::2]) * inside.transpose(0, 1)[:, None]
        patches = (after.mT @ patches).permute(2, 1, 0, 3).flatten(2).mT
        background, spectra = _spectra(rows, scale, shift, before)
        grad_kernel = _combine(before.mT, spectra.mT @ patches)
        del spectra
        grad_activated = _combine_each(before.mT, patches @ _combine(before, kernel).mT).flatten(0, 1)
        # ... and the background, everywhere.
        sums = fill_backward(grad, borders)
        grad_kernel += background[:, None] * sums.mT[:, None]
        grad_background = torch.einsum("kco,ok->c", kernel, sums) - grad_activated.sum(0)

        grad_activated = torch.cat([grad_background[None], grad_activated])
        grad_weight, grad_bias = from_kernel(grad_kernel, weight), sums[:, sums.shape[1] // 2]
        gradients = activate_backward(grad_activated, activate(rows, scale, shift), rows, scale)
        return grad_features, *[None] * 7, *gradients, grad_weight, grad_bias


def _spectra(
    rows: Annotated[Tensor, "K*M+1 C"], scale: Tensor, shift: Tensor, before: Annotated[Tensor, "J K"]
) -> tuple[Annotated[Tensor, "C"], Annotated[Tensor, "J M C"]]:
    """The activated row 0; and the combinations of what the others deviate from it, around each keypoint."""
    activated = activate(rows, scale, shift)
    background = activated[0].clone()
    deviations = activated[1:].sub_(background).view(before.shape[1], rows.shape[0] // before.shape[1], rows.shape[1])
    return background, _combine_each(before, deviations)


def _combine(matrix: Annotated[Tensor, "J K"], stack: Annotated[Tensor, "K M C"]) -> Annotated[Tensor, "J M C"]:
    """Linear combinations of the matrices of a stack."""
    return (matrix @ stack.flatten(1)).view(matrix.shape[0], *stack.shape[1:])


def _combine_each(matrix: Annotated[Tensor, "J K"], stack: Annotated[Tensor, "K M C"]) -> Annotated[Tensor, "J M C"]:
    """The same for a large stack: many small products are faster than one."""
    return (matrix @ stack.transpose(0, 1)).transpose(0, 1)


def _by_sample(index: Annotated[Tensor, "K B N"], *, channels: int) -> Annotated[Tensor, "B C K*N"]:
    return index.transpose(0, 1).flatten(1)[:, None].expand(-1, channels, -1)
