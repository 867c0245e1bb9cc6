"""Positions for attention: rotations of queries and keys, which depend on differences of positions only."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.types import Device

from kaf_layer.checks import check_counts
from kaf_layer.keypoints import Keypoints

__all__ = [
    "PositionType",
    "RotaryEncoder",
    "authors_positions",
    "check_position",
    "relative_positions",
    "rotate",
    "tell_of_other_positions",
]

PositionType = Literal["both", "rotary", "absolute", "none"]
Heads = Annotated[Tensor, "B N H W"]
Rotation = tuple[Annotated[Tensor, "B N 1 W/2"], Annotated[Tensor, "B N 1 W/2"]]  # cosines and sines


def check_position(position: PositionType) -> PositionType:
    """Checks the name of a position encoding, and returns it.

    Raises:
        ValueError: if it is unknown.
    """
    if position not in get_args(PositionType):
        raise ValueError(f"position must be one of {get_args(PositionType)}, got {position=}")
    return position


def relative_positions(keypoints: Keypoints, *, spatial_dims: int) -> Annotated[Tensor, "B N D"]:
    """Positions relative to the image's centre, in halves of its longest edge, in (x, y) or (x, y, z) order.

    Positions outside the image are clamped to its border. The result is float32, or float64 for positions of that type.

    Raises:
        ValueError: if the keypoints do not have ``spatial_dims`` coordinates.

    Example:
        >>> keypoints = Keypoints(torch.tensor([[[0.0, 0.0], [2.0, 1.0]]]), torch.ones(1, 2, dtype=torch.bool), (3, 5))
        >>> relative_positions(keypoints, spatial_dims=2)[0].tolist()
        [[-0.800000011920929, -0.4000000059604645], [0.0, 0.0]]
    """
    if keypoints.spatial_dims != spatial_dims:
        raise ValueError(f"keypoints must have {spatial_dims=} coordinates, got {keypoints.image_size=}")
    sizes = keypoints.image_size[::-1]
    axes = zip(keypoints.positions_in(keypoints.image_size).unbind(-1), sizes, strict=True)
    centred = [p.clamp(-0.5, s - 0.5) + (1 - s) / 2 for p, s in axes]
    return torch.stack(centred, dim=-1) * (2 / longest_edge(sizes))


def authors_positions(keypoints: Keypoints) -> Annotated[Tensor, "B N D"]:
    """Positions as the authors' code scales them. It subtracts half the size in (x, y) order from (y, x) positions."""
    sizes = keypoints.image_size[::-1]
    axes = zip(keypoints.positions_in(keypoints.image_size).unbind(-1), sizes, strict=True)
    positions = reversed([p.clamp(-0.5, s - 0.5) for p, s in axes])
    scale = 0.7 * longest_edge(sizes)
    return torch.stack([(p - s / 2) / scale for p, s in zip(positions, sizes, strict=True)], dim=-1)


def longest_edge(sizes: tuple[int, ...]) -> Any:
    """The largest size; sizes may be symbols."""
    # torch 2.11 cannot compile sym_max of plain numbers; max would fix the sizes of an exported program.
    return max(sizes) if torch.compiler.is_dynamo_compiling() else reduce(torch.sym_max, sizes)


class RotaryEncoder(nn.Module):
    """The rotations of queries and keys, block by block, by angles that are linear in the position.

    Each pair of channels of a head is a vector in a plane, which is rotated (Su et al., 2021, Section 3.2). A pair has
    a learned frequency vector, shared by the heads, as in LightGlue (Lindenberger et al., ICCV 2023, Section 3.1). The
    product of a query and a key then depends on the difference of their positions, so moving all keypoints alike
    changes nothing.

    Args:
        head_dim: W, the channels of a head; even.
        depth: L, the number of blocks. Each has frequencies of its own.
        spatial_dims: the number of coordinates of a position.
        device: where the weights are made; torch's default if None.
        dtype: the type of the weights; torch's default if None.

    Raises:
        ValueError: if ``head_dim`` is odd.

    Example:
        >>> rotary = RotaryEncoder(16, depth=6, spatial_dims=2)
        >>> rotations = rotary(torch.rand(1, 5, 2))
        >>> len(rotations), rotate(torch.rand(1, 5, 4, 16), rotations[0]).shape
        (6, torch.Size([1, 5, 4, 16]))
    """

    def __init__(
        self,
        head_dim: int,
        *,
        depth: int = 1,
        spatial_dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        check_counts(head_dim=head_dim, spatial_dims=spatial_dims)
        check_counts(depth=depth, least=0)
        if head_dim % 2:
            raise ValueError(
                'position="rotary" and "both" turn pairs of channels and need an even number in each head, '
                f'embed_dim / num_heads, got {head_dim}; or choose position="absolute" or "none"'
            )
        # Radians for half the longest edge. Wavelengths from six images down to a tenth of an image.
        magnitudes = torch.logspace(0, 1, head_dim // 2, base=30.0, **factory)
        directions = nn.functional.normalize(torch.randn(depth, head_dim // 2, spatial_dims, **factory), dim=-1)
        self.frequencies = nn.Parameter(magnitudes[:, None] * directions)

    def forward(
        self, positions: Annotated[Tensor, "B N D"], *, dtype: torch.dtype | None = None
    ) -> tuple[Rotation, ...]:
        """Cosines and sines of the angles of all blocks.

        Args:
            positions: (B, N, D), float32 or float64; the angles are computed in this type.
            dtype: the type of the queries and keys; that of the positions if None.

        Returns:
            For each block the cosines and the sines, both (B, N, 1, W/2), for [rotate][kaf_layer.positions.rotate].
        """
        # Products and a sum: under autocast a matrix product would run in half precision.
        angles = (positions[:, :, None, None, None] * self.frequencies[:, None]).sum(dim=-1)
        dtype = dtype or angles.dtype
        cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
        return tuple(zip(cosines.unbind(2), sines.unbind(2), strict=True))


def rotate(heads: Heads, rotation: Rotation) -> Heads:
    """Rotates queries or keys (B, N, H, W). The second half of the channels holds the other part of each pair.

    Example:
        >>> quarter = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> rotate(torch.tensor([[[[3.0, 4.0]]]]), quarter).tolist()
        [[[[-4.0, 3.0]]]]
    """
    (cos, sin), (first, second) = rotation, heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def tell_of_other_positions(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _metadata: dict[str, Any],
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    _errors: list[str],
) -> None:
    """Reports a state dict of another encoding, as the first of the missing keys; a hook that runs before loading.

    Torch does not tell modules whether loading is strict. If it is, missing keys are an error.
    """
    names = [name.removeprefix(prefix) for name in state_dict if name.startswith(f"{prefix}blocks.")]
    absolute = any(name.startswith(f"{prefix}position_encoder.") for name in state_dict)
    rotary = any(name.startswith(f"{prefix}rotary.") for name in state_dict)
    held = {(True, True): "both", (False, True): "rotary", (True, False): "absolute", (False, False): "none"}
    position = held[absolute, rotary]
    if names and position != module.position:
        missing.append(
            f'position: the weights of {prefix or "the module"} are of position="{position}", the module is of '
            f'position="{module.position}". Make it with position="{position}", or load what both have by strict=False'
        )
