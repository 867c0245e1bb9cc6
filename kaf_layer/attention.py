"""Attention: Transformers over the keypoints' tokens, with padded slots masked (Section 3.1 of the paper)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device
from torch.utils.checkpoint import checkpoint

from kaf_layer.checks import check_counts, check_precision, check_tokens
from kaf_layer.keypoints import Keypoints
from kaf_layer.normalization import MaskedBatchNorm, Moments, normalise_tokens, track
from kaf_layer.positions import (
    PositionType,
    RotaryEncoder,
    Rotation,
    authors_positions,
    check_position,
    relative_positions,
    rotate,
    tell_of_other_positions,
)
from kaf_layer.precision import product_dtype, single_under_autocast, without_autocast

__all__ = ["BlockType", "KeypointTransformer", "PositionEncoder", "PropagationBlock", "TransformerBlock", "key_mask"]

BlockType = Literal["transformer", "propagation"]
DEFAULT_POSITIONS: dict[BlockType, PositionType] = {"transformer": "both", "propagation": "absolute"}
Tokens = Annotated[Tensor, "B N E"]
Mask = Annotated[Tensor, "B 1 1 N"]


class KeypointTransformer(nn.Module):
    """Self-attention between keypoints, with their positions: every keypoint attends to every other.

    Args:
        embed_dim: E, the channels of a token.
        depth: the number of blocks.
        num_heads: the number of attention heads; divides ``embed_dim``.
        block: "transformer", a pre-norm block (Vaswani et al., 2017; Xiong et al., 2020), or
            "propagation", the block of the authors' code, after SuperGlue (Sarlin et al., 2020, Eq. 3).
        position: how attention knows where keypoints are. "absolute" adds an MLP of the position in the image to
            the tokens (Sarlin et al., 2020, Eq. 2). "rotary" rotates queries and keys in each block by angles linear
            in the position (Su et al., 2021), so that only differences of positions count. "both" and "none" are
            possible too. None means "both" for "transformer" blocks, and "absolute", the only encoding that the authors
            have, for "propagation" blocks.
        spatial_dims: the number of coordinates of a position.
        recompute: whether to compute each block again in the backward pass instead of saving its activations.
        device: where the weights are made; torch's default if None.
        dtype: the type of the weights; torch's default if None.

    Raises:
        ValueError: if ``embed_dim`` is not a multiple of ``num_heads``, an option is unknown, "rotary" or "both" is
            given with "propagation" or an odd number of channels in a head, or tokens do not fit the keypoints.

    Example:
        >>> keypoints = Keypoints(torch.rand(2, 5, 2) * 8, torch.ones(2, 5, dtype=torch.bool), (8, 12))
        >>> KeypointTransformer(32, depth=2)(torch.rand(2, 5, 32), keypoints).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int = 256,
        *,
        depth: int = 6,
        num_heads: int = 4,
        block: BlockType = "transformer",
        position: PositionType | None = None,
        spatial_dims: int = 2,
        recompute: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if block not in get_args(BlockType):
            raise ValueError(f"block must be one of {get_args(BlockType)}, got {block=}")
        check_counts(embed_dim=embed_dim, spatial_dims=spatial_dims)
        check_counts(depth=depth, least=0)
        self.embed_dim = embed_dim
        self.block: BlockType = block
        self.position: PositionType = check_position(position or DEFAULT_POSITIONS[block])
        self.spatial_dims = spatial_dims
        if block == "propagation" and self.position != "absolute":
            raise ValueError(
                f'position must be "absolute" with block="propagation", as the authors have it, got {position=}'
            )
        has_encoder, is_rotary = self.position in ("both", "absolute"), self.position in ("both", "rotary")
        self.position_encoder = (
            PositionEncoder(embed_dim, block=block, spatial_dims=spatial_dims, **factory) if has_encoder else None
        )
        if block == "transformer":
            self.blocks = nn.ModuleList(
                TransformerBlock(embed_dim, num_heads=num_heads, recompute=recompute, **factory) for _ in range(depth)
            )
            self.norm: Any = nn.LayerNorm(embed_dim, **factory)
        else:
            # The authors run every layer twice on the same tokens: two updates at 0.1 are one at 0.19.
            self.blocks = nn.ModuleList(
                PropagationBlock(embed_dim, num_heads=num_heads, momentum=0.19, recompute=recompute, **factory)
                for _ in range(depth)
            )
            self.norm = nn.Identity()
        # Last, so that with one seed the other weights start the same with and without it.
        self.rotary = (
            RotaryEncoder(embed_dim // num_heads, depth=depth, spatial_dims=spatial_dims, **factory)
            if is_rotary and depth
            else None
        )
        self.register_load_state_dict_pre_hook(tell_of_other_positions)

    def forward(self, tokens: Tokens, keypoints: Keypoints) -> Tokens:
        """Lets the tokens attend to each other.

        Args:
            tokens: (B, N, E), one for each slot.
            keypoints: the positions of the tokens.

        Returns:
            (B, N, E), zero in slots that are not valid.
        """
        check_tokens(tokens, keypoints, channels=self.embed_dim)
        check_precision(self, tokens=tokens)
        # With "absolute" the encoder computes and checks them; with "none" they are computed to be checked.
        is_absolute = self.position == "absolute"
        positions = None if is_absolute else relative_positions(keypoints, spatial_dims=self.spatial_dims)
        dtype, valid, mask = tokens.dtype, keypoints.valid[..., None], key_mask(keypoints, tokens.dtype)
        # Every block adds to the tokens: in bfloat16 their sum would lose what a block adds to large values.
        tokens = single_under_autocast(tokens).where(valid, 0.0)
        if self.position_encoder is not None:
            tokens = tokens + self.position_encoder(keypoints)
        rotations: Any = [None] * len(self.blocks)
        if self.rotary is not None:
            rotations = self.rotary(positions, dtype=product_dtype(tokens))
        for block, rotation in zip(self.blocks, rotations, strict=True):
            tokens = block(tokens, keypoints.valid, mask, rotation=rotation)
        return self.norm(tokens).where(valid, 0.0).to(dtype)

    def extra_repr(self) -> str:
        """The options that its parts do not show."""
        return f"block={self.block!r}, position={self.position!r}"


def key_mask(keypoints: Keypoints, dtype: torch.dtype) -> Mask | None:
    """The mask (B, 1, 1, N) that is added to attention scores: 0 for slots that may be attended to, else -inf.

    None if the keypoints promise that all slots are valid.
    """
    if not keypoints.padded:
        return None
    # A softmax over nothing is NaN, so a sample without keypoints attends to its (finite) padding.
    allowed = keypoints.valid == keypoints.valid.any(-1, keepdim=True)
    slots = allowed.shape[1]
    if not torch.compiler.is_compiling():  # CUDA's kernels need rows of 8, to which each block would copy the mask
        allowed = F.pad(allowed, (0, -slots % 8))
    return allowed.to(dtype).log()[:, None, None, :slots]  # each block would convert a boolean mask to this


class PositionEncoder(nn.Module):
    """An MLP from positions to tokens, like SuperGlue's (Sarlin et al., 2020, Eq. 2) without the score.

    For "propagation" blocks it computes the same as the authors' code. For "transformer" blocks
    positions are relative to the image's centre and half its longest edge, and layer norms
    replace the batch norms.

    Example:
        >>> keypoints = Keypoints(torch.rand(2, 5, 2) * 8, torch.ones(2, 5, dtype=torch.bool), (8, 12))
        >>> PositionEncoder(32)(keypoints).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        block: BlockType = "transformer",
        spatial_dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = (32, 64, 128, 256)
        self.block: BlockType = block
        self.spatial_dims = spatial_dims
        sizes = zip((spatial_dims, *hidden), hidden, strict=False)
        self.linears = nn.ModuleList(nn.Linear(before, after, **factory) for before, after in sizes)
        self.norms = nn.ModuleList(
            nn.LayerNorm(size, **factory) if block == "transformer" else MaskedBatchNorm(size, **factory)
            for size in hidden
        )
        self.out = nn.Linear(hidden[-1], embed_dim, **factory)

    def forward(self, keypoints: Keypoints) -> Tokens:
        """The encoded positions (B, N, E)."""
        positions = relative_positions(keypoints, spatial_dims=self.spatial_dims)
        x = positions if self.block == "transformer" else authors_positions(keypoints)
        weight = next(self.parameters(), None)
        if weight is not None:  # else a replica of nn.DataParallel, whose weights are no parameters
            x = x.to(weight.dtype)
        with without_autocast(x.device):  # bfloat16 cannot tell pixels apart in images of more than 256
            for projection, norm in zip(self.linears, self.norms, strict=True):
                x = projection(x)
                if self.block == "propagation":
                    x, moments = normalise_tokens(norm, x, keypoints.valid)
                    track(norm, moments)
                else:
                    x = norm(x)
                x = F.relu(x)
            return self.out(x)


class Attention(nn.Module):
    """Multi-head attention with one fused projection to queries, keys and values."""

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        check_counts(embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim=} and {num_heads=}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, **factory)
        self.out = nn.Linear(embed_dim, embed_dim, **factory)
        self.head_dim = embed_dim // num_heads

    def forward(
        self, tokens: Tokens, mask: Mask | None, source: Tokens | None = None, rotation: Rotation | None = None
    ) -> Tokens:
        """Lets tokens attend to ``source`` where the mask is 0. If it is None they attend to themselves."""
        query, key, value = self._heads(tokens, source, rotation)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))

    def weights(
        self, tokens: Tokens, mask: Mask | None, source: Tokens | None = None, rotation: Rotation | None = None
    ) -> Annotated[Tensor, "B H N M"]:
        """How much each token takes from each token of the source: the softmax, which ``forward`` never holds."""
        query, key, _ = self._heads(tokens, source, rotation)
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        return (scores if mask is None else scores + mask).softmax(dim=-1)

    def _heads(
        self, tokens: Tokens, source: Tokens | None, rotation: Rotation | None
    ) -> list[Annotated[Tensor, "B H N E/H"]]:
        """Queries, keys and values, head by head."""
        if rotation is not None:  # of queries and keys at once, since tokens attend to themselves
            both, value = self.qkv(tokens).split([2 * tokens.shape[-1], tokens.shape[-1]], dim=-1)
            query, key = rotate(self._by_head(both), rotation).chunk(2, dim=2)
            return [heads.transpose(1, 2) for heads in (query, key, self._by_head(value))]
        parts = self.qkv(tokens).chunk(3, dim=-1)
        if source is not None:
            parts = parts[0], *self.qkv(source).chunk(3, dim=-1)[1:]
        return [self._by_head(part).transpose(1, 2) for part in parts]

    def _by_head(self, channels: Annotated[Tensor, "B N C"]) -> Annotated[Tensor, "B N C/W W"]:
        return torch.unflatten(channels, -1, (-1, self.head_dim))

    def extra_repr(self) -> str:
        """The option that its parts do not show."""
        return f"num_heads={self.num_heads}"


class TransformerBlock(nn.Module):
    """A pre-norm Transformer block: attention, then an MLP of four times the width."""

    def __init__(
        self,
        embed_dim: int = 256,
        *,
        num_heads: int = 4,
        recompute: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.recompute = recompute
        self.attention_norm = nn.LayerNorm(embed_dim, **factory)
        self.attention = Attention(embed_dim, num_heads=num_heads, **factory)
        self.mlp_norm = nn.LayerNorm(embed_dim, **factory)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim, **factory), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim, **factory)
        )

    def forward(
        self,
        tokens: Tokens,
        valid: Annotated[Tensor, "B N"],  # noqa: ARG002
        mask: Mask | None,
        rotation: Rotation | None = None,
    ) -> Tokens:
        """Maps tokens (B, N, E) to tokens; layer norms do not depend on which slots are valid."""
        if self.recompute and torch.is_grad_enabled():
            # Nothing in it is random, so no generator's state needs to be kept.
            return checkpoint(self._forward, tokens, mask, rotation, use_reentrant=False, preserve_rng_state=False)
        return self._forward(tokens, mask, rotation)

    def _forward(self, tokens: Tokens, mask: Mask | None, rotation: Rotation | None) -> Tokens:
        tokens = tokens + self.attention(self.attention_norm(tokens), mask, None, rotation)
        return tokens + self.mlp(self.mlp_norm(tokens))


class PropagationBlock(nn.Module):
    """The block of the authors' code: it adds an MLP of the tokens and their attention (SuperGlue, Eq. 3).

    With a ``source`` the tokens attend to other tokens (cross-attention), otherwise to themselves.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        *,
        num_heads: int = 4,
        momentum: float = 0.1,
        recompute: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.recompute = recompute
        self.attention = Attention(embed_dim, num_heads=num_heads, **factory)
        self.expand = nn.Linear(2 * embed_dim, 2 * embed_dim, **factory)
        self.norm = MaskedBatchNorm(2 * embed_dim, momentum=momentum, **factory)
        self.contract = nn.Linear(2 * embed_dim, embed_dim, **factory)

    def forward(
        self,
        tokens: Tokens,
        valid: Annotated[Tensor, "B N"],
        mask: Mask | None,
        source: Tokens | None = None,
        rotation: Rotation | None = None,
    ) -> Tokens:
        """Maps tokens (B, N, E) to tokens; ``mask`` belongs to the slots of the source."""
        if self.recompute and torch.is_grad_enabled():
            arguments = tokens, valid, mask, source, rotation
            tokens, moments = checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens, moments = self._forward(tokens, valid, mask, source, rotation)
        track(self.norm, moments)  # not in what the backward pass repeats, which would count the batch twice
        return tokens

    def _forward(
        self,
        tokens: Tokens,
        valid: Annotated[Tensor, "B N"],
        mask: Mask | None,
        source: Tokens | None,
        rotation: Rotation | None,
    ) -> tuple[Tokens, Moments | None]:
        message = self.attention(tokens, mask, source, rotation)
        hidden = self.expand(torch.cat([tokens, message], dim=-1))
        hidden, moments = normalise_tokens(self.norm, hidden, valid)
        return tokens + self.contract(F.relu(hidden)), moments
