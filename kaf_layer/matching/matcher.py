"""KeypointMatcher: a learned, soft assignment between the keypoints of two images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.types import Device

from kaf_layer.attention import PositionEncoder, PropagationBlock, key_mask
from kaf_layer.checks import check_counts, check_precision, check_tokens
from kaf_layer.keypoints import Keypoints
from kaf_layer.matching.sinkhorn import log_sinkhorn
from kaf_layer.positions import (
    PositionType,
    RotaryEncoder,
    Rotation,
    check_position,
    relative_positions,
    tell_of_other_positions,
)
from kaf_layer.precision import at_least_float32, product_dtype, single_under_autocast, without_autocast

__all__ = ["KeypointMatcher"]


class KeypointMatcher(nn.Module):
    """SuperGlue's matching network (Sarlin et al., CVPR 2020, Sections 3.1 and 3.2).

    Attention blocks alternate between attention within each image and to the other image. Then the products of all
    pairs are scaled, and optimal transport assigns partners, with a learned dustbin for keypoints without one.

    Args:
        embed_dim: E, the channels of a token.
        depth: the number of blocks; every second one attends to the other image.
        num_heads: the number of attention heads; divides ``embed_dim``.
        iterations: the iterations of Sinkhorn's algorithm.
        position: how attention knows where keypoints are, as in [KeypointTransformer][kaf_layer.KeypointTransformer].
            Queries and keys are rotated within an image only, since differences between positions in two images mean
            nothing.
        spatial_dims: the number of coordinates of a position.
        device: where the weights are made; torch's default if None.
        dtype: the type of the weights; torch's default if None.

    Shape:
        - tokens_a: (B, N_a, E), one for each slot of keypoints_a.
        - tokens_b: (B, N_b, E), one for each slot of keypoints_b.
        - result: (B, N_a + 1, N_b + 1) log-probabilities, see [log_sinkhorn][kaf_layer.matching.log_sinkhorn]. The last
          column and row are the dustbins. Slots that are not valid have -inf.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if tokens do not fit their keypoints or the weights' type, or the batch sizes differ.

    Example:
        >>> a = Keypoints(torch.rand(2, 5, 2) * 8, torch.ones(2, 5, dtype=torch.bool), (8, 12))
        >>> b = Keypoints(torch.rand(2, 7, 2) * 8, torch.ones(2, 7, dtype=torch.bool), (8, 12))
        >>> KeypointMatcher(32)(torch.rand(2, 5, 32), a, torch.rand(2, 7, 32), b).shape
        torch.Size([2, 6, 8])
    """

    def __init__(
        self,
        embed_dim: int = 256,
        *,
        depth: int = 4,
        num_heads: int = 4,
        iterations: int = 100,
        position: PositionType = "absolute",
        spatial_dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        check_counts(embed_dim=embed_dim, iterations=iterations)
        check_counts(depth=depth, least=0)
        self.embed_dim, self.iterations = embed_dim, iterations
        self.position: PositionType = check_position(position)
        self.spatial_dims = spatial_dims
        has_encoder, is_rotary = position in ("both", "absolute"), position in ("both", "rotary")
        self.position_encoder = (
            PositionEncoder(embed_dim, block="propagation", spatial_dims=spatial_dims, **factory)
            if has_encoder
            else None
        )
        self.blocks = nn.ModuleList(PropagationBlock(embed_dim, num_heads=num_heads, **factory) for _ in range(depth))
        self.out = nn.Linear(embed_dim, embed_dim, **factory)
        self.dustbin = nn.Parameter(torch.tensor(1.0, **factory))
        within = (depth + 1) // 2  # the blocks in which an image attends to itself
        self.rotary = (
            RotaryEncoder(embed_dim // num_heads, depth=within, spatial_dims=spatial_dims, **factory)
            if is_rotary and within
            else None
        )
        self.register_load_state_dict_pre_hook(tell_of_other_positions)

    def forward(
        self,
        tokens_a: Annotated[Tensor, "B N_a E"],
        keypoints_a: Keypoints,
        tokens_b: Annotated[Tensor, "B N_b E"],
        keypoints_b: Keypoints,
    ) -> Annotated[Tensor, "B N_a+1 N_b+1"]:
        """Computes the log-probabilities of every pair, and of having no partner.

        Args:
            tokens_a: (B, N_a, E), one for each slot of keypoints_a.
            keypoints_a: the keypoints of one image of each pair.
            tokens_b: (B, N_b, E), one for each slot of keypoints_b.
            keypoints_b: the keypoints of the other image.

        Returns:
            (B, N_a + 1, N_b + 1).
        """
        check_tokens(tokens_a, keypoints_a, channels=self.embed_dim, side="_a")
        check_tokens(tokens_b, keypoints_b, channels=self.embed_dim, side="_b")
        check_precision(self, tokens_a=tokens_a, tokens_b=tokens_b)
        if tokens_a.shape[0] != tokens_b.shape[0]:
            raise ValueError(
                f"tokens_a and tokens_b must have the same batch size, got {tokens_a.shape=} and {tokens_b.shape=}"
            )
        (a, valid_a, mask_a, turns_a), (b, valid_b, mask_b, turns_b) = (
            (
                self._encode(tokens, keypoints),
                keypoints.valid,
                key_mask(keypoints, tokens.dtype),
                self._rotations(tokens, keypoints),
            )
            for tokens, keypoints in ((tokens_a, keypoints_a), (tokens_b, keypoints_b))
        )
        for i, block in enumerate(self.blocks):
            if i % 2 == 0:
                turn_a, turn_b = turns_a[i // 2], turns_b[i // 2]
                a, b = block(a, valid_a, mask_a, rotation=turn_a), block(b, valid_b, mask_b, rotation=turn_b)
            else:
                a, b = block(a, valid_a, mask_b, b), block(b, valid_b, mask_a, a)
        a, b = self.out(a), self.out(b)
        with without_autocast(a.device):
            dtype = at_least_float32(a.dtype)
            scores = a.to(dtype) @ b.to(dtype).mT / a.shape[-1] ** 0.5
            return log_sinkhorn(scores, self.dustbin, iterations=self.iterations, valid_a=valid_a, valid_b=valid_b)

    def extra_repr(self) -> str:
        """The options that its parts do not show."""
        return f"iterations={self.iterations}, position={self.position!r}"

    def _encode(self, tokens: Annotated[Tensor, "B N E"], keypoints: Keypoints) -> Annotated[Tensor, "B N E"]:
        tokens = single_under_autocast(tokens).masked_fill(~keypoints.valid[..., None], 0.0)
        return tokens if self.position_encoder is None else tokens + self.position_encoder(keypoints)

    def _rotations(self, tokens: Annotated[Tensor, "B N E"], keypoints: Keypoints) -> Sequence[Rotation | None]:
        positions = relative_positions(keypoints, spatial_dims=self.spatial_dims)
        if self.rotary is None:
            return [None] * len(self.blocks)
        return self.rotary(positions, dtype=product_dtype(tokens))
