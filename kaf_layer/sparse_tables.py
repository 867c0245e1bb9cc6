"""Where the keypoints are: integer tables of the rows that meet in the diffusion network's two convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Tables", "build_tables"]


class Tables(NamedTuple):
    """Which rows meet in the two convolutions, for M = B * N tokens, R rows, P pixels per sample, K = 3^D positions."""

    first: Annotated[Tensor, "M"]  # the first slot in the same cell
    rows: Annotated[Tensor, "R+1 K"]  # the tokens around a row; M where there is none
    rows_t: Annotated[Tensor, "M K"]  # the rows around a token; R + 1 outside the map
    pixels: Annotated[Tensor, "B*P K"]  # the rows around a pixel; R where there is none, R + 1 outside the map
    pixels_t: Annotated[Tensor, "R K"]  # the pixels around a row; B*P outside the map
    addresses: Annotated[Tensor, "B P"]  # the pixels' row-major indices


def build_tables(
    cells: Annotated[Tensor, "B N"], valid: Annotated[Tensor, "B N"], size: Sequence[int], *, every_pixel: bool = False
) -> Tables:
    """Builds the tables for keypoints in these cells.

    Row R, the last, stands for all pixels without a row. A pixel may appear several times among those of the
    second convolution: it is given the same value each time.

    Args:
        cells: the row-major index of each slot's cell.
        valid: which slots are keypoints.
        size: the map's size.
        every_pixel: makes every pixel of the map a row, in row-major order.
    """
    whole_map = torch.arange(prod(size), device=cells.device).expand(len(cells), -1)
    at_tokens = _address(cells, size, radius=0)
    at_rows = _address(whole_map, size, radius=0) if every_pixel else _address(cells, size, radius=1)
    at_pixels = _address(cells, size, radius=2)
    offsets = _offsets(size, cells.device)
    M, R, P = len(at_tokens), len(at_rows), len(at_pixels)

    occupants = partial(_occupants, size=size, batch=len(cells))
    token_at = occupants(at_tokens, none=M, outside=M, skip=~valid.flatten())
    row_at = occupants(at_rows, none=R, outside=R + 1)
    pixel_at = occupants(at_pixels, none=P, outside=P)

    slots = torch.arange(M, device=cells.device)
    is_first = row_at[at_rows] == torch.arange(R, device=cells.device)
    rows = _lookup(token_at, at_rows, offsets).masked_fill(~is_first[:, None], M)
    return Tables(
        first=torch.where(valid.flatten(), token_at[at_tokens], slots),
        rows=F.pad(rows, (0, 0, 0, 1), value=M),
        rows_t=_lookup(row_at, at_tokens, -offsets),
        pixels=_lookup(row_at, at_pixels, offsets),
        pixels_t=_lookup(pixel_at, at_rows, -offsets),
        addresses=_around(cells, size, radius=2),
    )


def _around(
    cells: Annotated[Tensor, "B N"], size: Sequence[int], *, radius: int, margin: int = 0
) -> Annotated[Tensor, "B N*K"]:
    """The pixels up to ``radius`` away on each axis, clamped into the map, as indices of a map with a margin."""
    steps = torch.arange(-radius, radius + 1, device=cells.device)
    index = torch.zeros_like(cells)[..., None]
    for axis, length in enumerate(size):
        coordinate = cells // prod(size[axis + 1 :]) % length
        near = (coordinate[..., None] + steps).clamp(0, length - 1) + margin
        index = (index[..., None] * (length + 2 * margin) + near[..., None, :]).flatten(2)
    return index.flatten(1)


def _address(cells: Annotated[Tensor, "B N"], size: Sequence[int], *, radius: int) -> Annotated[Tensor, "B*N*K"]:
    """As :func:`_around`, in a batch of maps with a margin of one pixel: a neighbour is then a constant away."""
    sample = torch.arange(len(cells), device=cells.device)[:, None]
    return (_around(cells, size, radius=radius, margin=1) + sample * prod([s + 2 for s in size])).flatten()


def _offsets(size: Sequence[int], device: torch.device) -> Annotated[Tensor, "K"]:
    """From an address to those at the kernel's positions."""
    offsets = torch.zeros(1, dtype=torch.long, device=device)
    for length in size:
        offsets = (offsets[:, None] * (length + 2) + torch.arange(-1, 2, device=device)).flatten()
    return offsets


def _occupants(
    addresses: Annotated[Tensor, "M"],
    *,
    size: Sequence[int],
    batch: int,
    none: int,
    outside: int,
    skip: Annotated[Tensor, "M"] | None = None,
) -> Annotated[Tensor, "B*S"]:
    """The index of the first entry at each address, ``none`` where there is none, ``outside`` in the margin."""
    entries = torch.arange(len(addresses), device=addresses.device, dtype=torch.int32)
    if skip is not None:
        entries = entries.masked_fill(skip, none)
    interior = torch.full((batch, *size), none, dtype=torch.int32, device=addresses.device)
    table = F.pad(interior, (1, 1) * len(size), value=outside).flatten()
    return table.scatter_reduce(0, addresses, entries, "amin")


def _lookup(
    table: Annotated[Tensor, "B*S"], addresses: Annotated[Tensor, "M"], offsets: Annotated[Tensor, "K"]
) -> Annotated[Tensor, "M K"]:
    """What the table holds at each offset from each address."""
    return table.index_select(0, (addresses[:, None] + offsets).flatten()).view(len(addresses), len(offsets))
