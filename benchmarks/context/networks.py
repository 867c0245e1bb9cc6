"""The networks that learn the synthetic task. They are small, and differ in how they see distant pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.unet import KAFUNet, UNet, UNetC2
from kaf_layer import GridDetector, KAFOutput, Keypoints, KeypointTransformer

LEVELS, WIDTH = 3, 8
ATTENTION: dict[str, Any] = {"embed_dim": 64, "depth": 2}


class GlobalAttention(nn.Module):
    """Takes the place of a KAF layer: all patches attend to each other, and their tokens are concatenated with the map.

    Patches are embedded as in a ViT (Dosovitskiy et al., 2021). The blocks are those of the KAF layer.
    """

    def __init__(self, channels: int, *, patch: int, embed_dim: int, depth: int) -> None:
        super().__init__()
        self.fused_channels, self.patch = 2 * channels, patch
        self.embed = nn.Conv2d(channels, embed_dim, patch, stride=patch)
        self.transformer = KeypointTransformer(embed_dim, depth=depth)
        self.out = nn.Linear(embed_dim, channels)

    def forward(self, features: Tensor, _keypoints: Keypoints) -> KAFOutput:
        embedded = self.embed(features)
        grid = GridDetector(1)(embedded)
        tokens = self.transformer(embedded.flatten(2).mT, grid)
        spread = F.interpolate(self.out(tokens).mT.unflatten(2, embedded.shape[2:]), features.shape[2:])
        return KAFOutput(torch.cat([features, spread], dim=1), tokens)


def swin() -> nn.Module:
    """Builds MONAI's SwinUNETR, whose layers see windows of 7 pixels at strides 2 to 32."""
    from monai.networks.nets import SwinUNETR

    from examples.protocol.models.networks import WithoutKeypoints

    return WithoutKeypoints(SwinUNETR(1, 2, feature_size=12, spatial_dims=2))


def global_attention() -> nn.Module:
    """Builds a UNet in which all patches of 16x16 image pixels attend to each other, on the scales of KAF layers."""
    layers = [GlobalAttention(WIDTH * 2**i, patch=16 // 2**i, **ATTENTION) for i in range(LEVELS - 1)]
    return UNet(1, 2, width=WIDTH, layers=layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": lambda: UNet(1, 2, width=WIDTH, layers=[None] * (LEVELS - 1)),
    "UNet (c2)": lambda: UNetC2(1, 2, width=WIDTH, levels=LEVELS),
    "KAF-UNet": lambda: KAFUNet(1, 2, width=WIDTH, levels=LEVELS, **ATTENTION),
    "KAF-UNet, added": lambda: KAFUNet(1, 2, width=WIDTH, levels=LEVELS, fusion="add", **ATTENTION),
    "SwinUNETR": swin,
    "global attention": global_attention,
}
