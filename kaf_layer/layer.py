"""KAFLayer: sample, attend, diffuse and fuse (Figure 1 and Section 3.1 of the paper)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor, nn
from torch.types import Device

from kaf_layer.attention import BlockType, KeypointTransformer
from kaf_layer.checks import check_counts, check_features, check_precision, raise_torchscript_error
from kaf_layer.diffusion import KeypointDiffusion
from kaf_layer.keypoints import Keypoints
from kaf_layer.positions import PositionType
from kaf_layer.sampling import KeypointSampler, SamplingMode
from kaf_layer.scattering import Reduce

__all__ = ["FusionMode", "KAFLayer", "KAFOutput"]

FusionMode = Literal["concat", "add"]


class KAFOutput(NamedTuple):
    """What a KAFLayer returns: the fused map (B, fused_channels, *S) and the tokens (B, N, E)."""

    features: Annotated[Tensor, "B F *S"]
    tokens: Annotated[Tensor, "B N E"]


class KAFLayer(nn.Module):
    """The keypoint-augmented fusion layer: long-range attention between keypoints, fused into a feature map.

    The features at the keypoints become tokens, which attend to each other. The tokens are put back at the keypoints'
    cells, two 3x3 convolutions diffuse them around, and the result is fused with the feature map.

    Args:
        in_channels: C, the channels of the feature map.
        out_channels: the channels of the diffused map; ``in_channels`` if None.
        embed_dim: E, the channels of a token.
        depth: the number of attention blocks.
        num_heads: the number of attention heads; divides ``embed_dim``.
        hidden_channels: the channels between the two convolutions.
        sampling: "bilinear", or "nearest" as in the authors' code.
        reduce: how tokens in one cell are combined: "mean", "sum" or "amax".
        block: "transformer", or "propagation" as in the authors' code.
        position: how attention knows where keypoints are: "absolute", "rotary", "both" or "none". None is the
            block's default, see [KeypointTransformer][kaf_layer.KeypointTransformer].
        fusion: "concat" concatenates the features and the diffused map, as in the paper. "add" adds the map, times a
            learned gain for each channel that starts at zero, so that the layer starts as the exact identity.
        spatial_dims: 2 or 3.
        recompute: whether to compute each attention block again in the backward pass instead of saving its activations.
        device: where the weights are made; torch's default if None.
        dtype: the type of the weights; torch's default if None.

    Attributes:
        fused_channels: the channels of the result.

    Raises:
        TypeError: if ``features`` is not a tensor or ``keypoints`` is not ``Keypoints``.
        ValueError: if an option is unknown, or the features do not have ``in_channels`` channels, are not a map of the
            keypoints' image, or do not have the weights' type and autocast does not convert them to it.

    Example:
        >>> layer = KAFLayer(16, embed_dim=32, depth=2)
        >>> keypoints = Keypoints(torch.rand(2, 5, 2) * 8, torch.ones(2, 5, dtype=torch.bool), (8, 12))
        >>> features, tokens = layer(torch.rand(2, 16, 4, 6), keypoints)
        >>> features.shape, tokens.shape
        (torch.Size([2, 32, 4, 6]), torch.Size([2, 5, 32]))
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,
        embed_dim: int = 256,
        depth: int = 6,
        num_heads: int = 4,
        hidden_channels: int = 64,
        sampling: SamplingMode = "bilinear",
        reduce: Reduce = "mean",
        block: BlockType = "transformer",
        position: PositionType | None = None,
        fusion: FusionMode = "concat",
        spatial_dims: int = 2,
        recompute: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        out_channels = in_channels if out_channels is None else out_channels
        check_counts(in_channels=in_channels, out_channels=out_channels, embed_dim=embed_dim)
        if fusion not in get_args(FusionMode):
            raise ValueError(f"fusion must be one of {get_args(FusionMode)}, got {fusion=}")
        if fusion == "add" and out_channels != in_channels:
            raise ValueError(f'fusion="add" needs as many channels out as in, got {in_channels=} and {out_channels=}')
        self.in_channels = in_channels
        self.fused_channels = in_channels + (out_channels if fusion == "concat" else 0)
        self.fusion: FusionMode = fusion
        self.sampler = KeypointSampler(sampling, masked=False)  # the Transformer masks its tokens
        self.embed = nn.Linear(in_channels, embed_dim, **factory)
        self.transformer = KeypointTransformer(
            embed_dim,
            depth=depth,
            num_heads=num_heads,
            block=block,
            position=position,
            spatial_dims=spatial_dims,
            recompute=recompute,
            **factory,
        )
        self.diffusion = KeypointDiffusion(
            embed_dim,
            out_channels,
            hidden_channels=hidden_channels,
            reduce=reduce,
            spatial_dims=spatial_dims,
            **factory,
        )
        if fusion == "add":
            # LayerScale (Touvron et al., 2021) from zero, as in ReZero. If the last convolution were zero instead, one
            # step of Adam would make its map, a sum over hundreds of inputs, larger than the features.
            self.gain = nn.Parameter(torch.zeros(out_channels, **factory))

    def forward(self, features: Annotated[Tensor, "B C *S"], keypoints: Keypoints) -> KAFOutput:
        """Fuses a feature map with attention between keypoints.

        Args:
            features: (B, C, *S), a map of the keypoints' image.
            keypoints: N slots per sample.

        Returns:
            The fused map (B, fused_channels, *S) and the tokens (B, N, E).
        """
        check_features(features, keypoints)
        check_precision(self, features=features)
        if features.shape[1] != self.in_channels:
            raise ValueError(f"features must have in_channels={self.in_channels} channels, got {features.shape=}")
        size = features.shape[2:]
        keypoints = keypoints.resize(size, snap=self.sampler.mode == "nearest")
        # Tokens are no image: the metadata of a MetaTensor of MONAI stay with the features.
        plain = features.as_tensor() if hasattr(features, "as_tensor") else features
        tokens = self.transformer(self.embed(self.sampler(plain, keypoints)), keypoints)
        gain = self.gain if self.fusion == "add" else None
        return KAFOutput(self.diffusion(tokens, keypoints, size, features=features, gain=gain), tokens)

    def extra_repr(self) -> str:
        """The options that its parts do not show."""
        return f"in_channels={self.in_channels}, fused_channels={self.fused_channels}, fusion={self.fusion!r}"

    def __prepare_scriptable__(self) -> NoReturn:
        raise_torchscript_error()
