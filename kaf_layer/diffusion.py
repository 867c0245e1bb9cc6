"""Tokens to a dense feature map: the diffusion network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaf_layer.keypoints import Keypoints
from kaf_layer.scattering import Reduce, check_tokens, scatter_keypoints

__all__ = ["KeypointDiffusion"]


class KeypointDiffusion(nn.Module):
    """Spreads tokens over a feature map: convolution, batch normalisation, ReLU, convolution (section 3.2).

    Args:
        in_channels: of a token.
        out_channels: of the map.
        hidden_channels: between the two convolutions.
        reduce: what becomes of keypoints in one cell, ``"mean"``, ``"sum"`` or ``"amax"``.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: if ``spatial_dims`` is neither.

    Example:
        >>> kp = Keypoints(torch.rand(2, 5, 2) * 32, torch.ones(2, 5).bool(), (32, 48))
        >>> diffusion = KeypointDiffusion(256, 16)
        >>> diffusion(torch.randn(2, 5, 256), kp, (16, 24)).shape
        torch.Size([2, 16, 16, 24])
        >>> diffusion(torch.randn(2, 5, 256), kp, (16, 24), features=torch.randn(2, 8, 16, 24)).shape
        torch.Size([2, 24, 16, 24])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 64,
        reduce: Reduce = "mean",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims=}")
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if spatial_dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.reduce: Reduce = reduce
        self.conv1 = conv(in_channels, hidden_channels, 3, padding=1)
        self.norm = norm(hidden_channels)
        self.conv2 = conv(hidden_channels, out_channels, 3, padding=1)

    def forward(
        self,
        tokens: Annotated[Tensor, "B N C"],
        keypoints: Keypoints,
        size: Sequence[int],
        *,
        features: Annotated[Tensor, "B F *S"] | None = None,
    ) -> Annotated[Tensor, "B out *S"]:
        """Tokens to a map of the given size.

        Args:
            tokens: one per slot. Slots that are not valid may hold anything.
            keypoints: where the tokens belong.
            size: the map's size in tensor order.
            features: a map to put before the result's channels, as fusion by concatenation does.

        Raises:
            ValueError: if the shapes do not fit.
        """
        check_tokens(tokens, keypoints, size)
        sparse_map = scatter_keypoints(tokens, keypoints, size, reduce=self.reduce)
        diffused: Tensor = self.conv2(F.relu(self.norm(self.conv1(sparse_map))))
        return diffused if features is None else torch.cat([features, diffused], dim=1)
