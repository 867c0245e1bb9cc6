"""Scattering: tokens to a sparse feature map."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Literal, get_args

import torch
from torch import Tensor, nn

from kaf_layer.checks import check_tokens
from kaf_layer.keypoints import Keypoints, check_size
from kaf_layer.precision import at_least_float32

__all__ = [
    "KeypointScatter",
    "Reduce",
    "batch_index",
    "cell_shares",
    "check_reduce",
    "scatter_keypoints",
]

Reduce = Literal["mean", "sum", "amax"]


def scatter_keypoints(
    tokens: Annotated[Tensor, "B N C"], keypoints: Keypoints, size: Sequence[int], *, reduce: Reduce = "mean"
) -> Annotated[Tensor, "B C *S"]:
    """Writes tokens into the cells of their keypoints, in a map that is zero elsewhere.

    Args:
        tokens: (B, N, C), one per slot. Slots that are not valid may hold anything.
        keypoints: the positions of the tokens, in any number of dimensions.
        size: the map's size in tensor order, ``(H, W)`` or ``(D, H, W)``.
        reduce: how tokens in one cell are combined: ``"mean"``, ``"sum"`` or ``"amax"``. The last takes the maximum of
            each channel; tokens that attain it share its gradient equally.

    Returns:
        (B, C, *size).

    Raises:
        TypeError: if ``tokens`` is not a tensor or ``keypoints`` is not ``Keypoints``.
        ValueError: if the shapes do not fit, or ``reduce`` is unknown.

    Example:
        >>> kp = Keypoints(torch.tensor([[[0.0, 0.0], [1.0, 1.0], [5.0, 3.0]]]), torch.ones(1, 3).bool(), (4, 6))
        >>> scatter_keypoints(torch.tensor([[[1.0], [2.0], [4.0]]]), kp, (2, 3))[0, 0]
        tensor([[1.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 4.0000]])
    """
    check_tokens(tokens, keypoints)
    check_size(size, keypoints)
    (batch, _, channels), pixels = tokens.shape, prod(size)
    cells = keypoints.cells(size)
    shares = cell_shares(tokens, keypoints, cells, size, reduce=reduce)
    tokens = tokens.where(keypoints.valid[..., None], 0.0) if keypoints.padded else tokens
    summands = tokens * shares.to(tokens.dtype)
    index = cells[:, None].expand(-1, channels, -1)
    return summands.new_zeros(batch, channels, pixels).scatter_add(2, index, summands.mT).view(batch, channels, *size)


def batch_index(cells: Annotated[Tensor, "... B N"], size: Sequence[int]) -> Annotated[Tensor, "... B N"]:
    """The indices of cells in a batch of maps that is flattened into one.

    Args:
        cells: row-major indices in a map.
        size: the map's size.
    """
    return torch.add(cells, torch.arange(cells.shape[-2], device=cells.device)[:, None], alpha=prod(size))


def cell_shares(
    tokens: Annotated[Tensor, "B N C"],
    keypoints: Keypoints,
    cells: Annotated[Tensor, "B N"],
    size: Sequence[int],
    *,
    reduce: Reduce,
) -> Annotated[Tensor, "B N W"]:
    """The weight of each token in its cell: the weighted sum of a cell's tokens is their reduction.

    Slots that are not valid have weight 0. For the maximum each of the C channels has a weight of its own, and W is C.
    For the mean and the sum W is 1.

    Args:
        tokens: one for each slot.
        keypoints: the positions of the tokens.
        cells: the keypoints' cells in a map of this size.
        size: the map's size.
        reduce: ``"mean"``, ``"sum"`` or ``"amax"``.

    Raises:
        ValueError: if ``reduce`` is unknown.

    Example:
        >>> kp = Keypoints(torch.tensor([[[0.0, 0.0], [1.0, 1.0], [5.0, 3.0]]]), torch.ones(1, 3).bool(), (4, 6))
        >>> cell_shares(torch.rand(1, 3, 8), kp, kp.cells((2, 3)), (2, 3), reduce="mean").flatten().tolist()
        [0.5, 0.5, 1.0]
    """
    check_reduce(reduce)
    valid, rows = keypoints.valid.flatten(), tokens.detach().flatten(0, 1)
    chosen = valid[:, None].to(at_least_float32(rows.dtype))  # bfloat16 cannot count further than 256
    if reduce == "sum":
        return torch.unflatten(chosen, 0, cells.shape)
    # Sums over representatives take an entry for each slot, and not one for each pixel.
    group = _representatives(keypoints.valid, cells, size)
    if reduce == "amax":
        largest = rows.scatter_reduce(0, group[:, None].expand_as(rows), rows, "amax")
        chosen = chosen * (rows == largest[group])  # all that attain the maximum, which share it below
    shares = chosen / torch.zeros_like(chosen).index_add(0, group, chosen)[group].clamp(min=1)
    return torch.unflatten(shares, 0, cells.shape)


def _representatives(
    valid: Annotated[Tensor, "B N"], cells: Annotated[Tensor, "B N"], size: Sequence[int]
) -> Annotated[Tensor, "B*N"]:
    """For each valid slot, one slot that represents its cell; a slot that is not valid represents itself."""
    total, cells, valid = cells.shape[0] * prod(size), batch_index(cells, size).flatten(), valid.flatten()
    slots = torch.arange(cells.shape[0], device=cells.device)
    # Only cells that were written are read, so the table needs no initialisation.
    table = cells.new_empty(total + 1).scatter_(0, cells.where(valid, total), slots)
    return torch.where(valid, table[cells], slots)


def check_reduce(reduce: str) -> None:
    """Checks that ``reduce`` is known.

    Raises:
        ValueError: if it is not.
    """
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce must be one of {get_args(Reduce)}, got {reduce=}")


class KeypointScatter(nn.Module):
    """[scatter_keypoints][kaf_layer.scatter_keypoints] as a module.

    Args:
        reduce: how tokens in one cell are combined: ``"mean"``, ``"sum"`` or ``"amax"``.

    Raises:
        ValueError: if ``reduce`` is unknown.

    Example:
        >>> kp = Keypoints(torch.rand(2, 5, 2), torch.ones(2, 5).bool(), (8, 6))
        >>> KeypointScatter("amax")(torch.randn(2, 5, 16), kp, (4, 3)).shape
        torch.Size([2, 16, 4, 3])
    """

    def __init__(self, reduce: Reduce = "mean") -> None:
        super().__init__()
        check_reduce(reduce)
        self.reduce: Reduce = reduce

    def forward(
        self, tokens: Annotated[Tensor, "B N C"], keypoints: Keypoints, size: Sequence[int]
    ) -> Annotated[Tensor, "B C *S"]:
        """Writes tokens into a map that is zero elsewhere.

        Args:
            tokens: (B, N, C), one per slot.
            keypoints: the positions of the tokens.
            size: the map's size in tensor order.

        Returns:
            (B, C, *size).
        """
        return scatter_keypoints(tokens, keypoints, size, reduce=self.reduce)

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return f"reduce={self.reduce!r}"
