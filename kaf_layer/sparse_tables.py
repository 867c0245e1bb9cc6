"""Which keypoints, rows and pixels are neighbours: the integer tables of the sparse diffusion network.

All shapes follow from those of the inputs. Where keypoints are close, several rows stand for one pixel; all but the
last of them stay empty. Keypoints on the border have fewer neighbours; the missing ones are repetitions of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PixelTables", "RowTables", "build_pixel_tables", "build_row_tables"]

_OUTSIDE, _EMPTY = 0, 1


class RowTables(NamedTuple):
    """The first convolution, from M = B * N tokens to R rows, with K = 3^D kernel positions.

    Before the R rows comes one that stands for all pixels without a row.
    """

    tokens: Annotated[Tensor, "R+1 K"]  #: 1 + the token next to a row, 0 for none
    rows: Annotated[Tensor, "M K"]  #: transposed: 2 + the row next to a token, 0 outside the map
    last: Annotated[Tensor, "M"]  #: the last slot in the same cell as a slot
    row_at: Annotated[Tensor, "A"]  #: 2 + the row at an address, 1 for none, 0 outside the map
    addresses: Annotated[Tensor, "R"]  #: of the rows


class PixelTables(NamedTuple):
    """The second convolution, from R rows to P pixels of each sample, of which some are the same."""

    rows: Annotated[Tensor, "B*P K"]  #: 2 + the row next to a pixel, 1 for none, 0 outside the map
    pixels: Annotated[Tensor, "R K"]  #: transposed: 1 + the pixel next to a row, 0 outside the map
    cells: Annotated[Tensor, "B P"]  #: the pixels' row-major indices in their map


def build_row_tables(
    cells: Annotated[Tensor, "B N"], valid: Annotated[Tensor, "B N"], size: Sequence[int], *, every_pixel: bool = False
) -> RowTables:
    """Finds the rows: the pixels at most one away from a keypoint, or every pixel.

    Args:
        cells: the row-major index of each slot's cell.
        valid: which slots are keypoints.
        size: the map's size.
        every_pixel: makes all pixels rows, in row-major order.
    """
    slots, valid = torch.arange(valid.numel(), device=cells.device), valid.flatten()
    at_tokens = _addresses(cells, size, radius=0)
    token_at = _occupants(at_tokens, torch.where(valid, slots + 1, 0), cells, size, empty=0)
    if every_pixel:
        everywhere = torch.arange(prod(size), device=cells.device).expand(cells.shape[0], -1)
        at_rows = _addresses(everywhere, size, radius=0)
    else:
        at_rows = _addresses(cells, size, radius=1)
    rows = torch.arange(2, 2 + at_rows.shape[0], device=cells.device)
    row_at = _occupants(at_rows, rows, cells, size, empty=_EMPTY)
    offsets = _offsets(size, cells.device)
    tokens = _lookup(token_at, at_rows, offsets).masked_fill((row_at[at_rows] != rows)[:, None], 0)
    return RowTables(
        tokens=F.pad(tokens, (0, 0, 1, 0)),
        rows=_lookup(row_at, at_tokens, -offsets),
        last=torch.where(valid, token_at[at_tokens] - 1, slots),
        row_at=row_at,
        addresses=at_rows,
    )


def build_pixel_tables(cells: Annotated[Tensor, "B N"], size: Sequence[int], tables: RowTables) -> PixelTables:
    """Finds the pixels at most two away from a keypoint, and the rows next to them.

    Args:
        cells: the row-major index of each slot's cell.
        size: the map's size.
        tables: those of the first convolution.
    """
    at_pixels = _addresses(cells, size, radius=2)
    pixels = torch.arange(1, 1 + at_pixels.shape[0], device=cells.device)
    pixel_at = _occupants(at_pixels, pixels, cells, size, empty=0)
    offsets = _offsets(size, cells.device)
    return PixelTables(
        rows=_lookup(tables.row_at, at_pixels, offsets),
        pixels=_lookup(pixel_at, tables.addresses, -offsets),
        cells=_around(cells, size, radius=2),
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


def _addresses(cells: Annotated[Tensor, "B N"], size: Sequence[int], *, radius: int) -> Annotated[Tensor, "B*N*K"]:
    """As :func:`_around`, in a batch of maps with a margin of one pixel: a neighbour is then a constant away."""
    sample = torch.arange(cells.shape[0], device=cells.device)[:, None]
    return (_around(cells, size, radius=radius, margin=1) + sample * prod([s + 2 for s in size])).flatten()


def _offsets(size: Sequence[int], device: torch.device) -> Annotated[Tensor, "K"]:
    """The constants, from an address to those at the kernel's positions."""
    offsets = torch.zeros(1, dtype=torch.long, device=device)
    for length in size:
        offsets = (offsets[:, None] * (length + 2) + torch.arange(-1, 2, device=device)).flatten()
    return offsets


def _occupants(
    addresses: Annotated[Tensor, "M"],
    entries: Annotated[Tensor, "M"],
    cells: Annotated[Tensor, "B N"],
    size: Sequence[int],
    *,
    empty: int,
) -> Annotated[Tensor, "A"]:
    """A table of the largest entry at each address, ``empty`` where there is none."""
    interior = torch.full((cells.shape[0], *size), empty, dtype=torch.int32, device=cells.device)
    table = F.pad(interior, (1, 1) * len(size), value=_OUTSIDE).flatten()
    return table.scatter_reduce(0, addresses, entries.int(), "amax")


def _lookup(
    table: Annotated[Tensor, "A"], addresses: Annotated[Tensor, "M"], offsets: Annotated[Tensor, "K"]
) -> Annotated[Tensor, "M K"]:
    """What the table holds at each offset from each address."""
    return table.index_select(0, (addresses[:, None] + offsets).flatten()).view(addresses.shape[0], offsets.shape[0])
