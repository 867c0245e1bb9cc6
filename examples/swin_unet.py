"""Swin-Unet (Cao et al., "Swin-Unet: Unet-like pure Transformer for medical image segmentation", 2022), in 2-D.

logits = SwinUNet(in_channels=1, num_classes=4)(images)  # from MONAI's Swin blocks
"""

import torch
from einops import rearrange
from monai.networks.nets.swin_unetr import BasicLayer, PatchEmbed, PatchMergingV2
from torch import Tensor, nn

from kaf_layer import KAFEncoder, Keypoints

WINDOW = 7
HEADS = (3, 6, 12, 24)


def swin_blocks(level: int, embed_dim: int) -> BasicLayer:
    """Two blocks, the second with shifted windows, for maps (B, C, H, W) of C = embed_dim * 2**level channels."""
    options = {"window_size": (WINDOW, WINDOW), "drop_path": [0.0, 0.0], "qkv_bias": True}
    return BasicLayer(embed_dim * 2**level, depth=2, num_heads=HEADS[level], **options)


class Merge(nn.Module):
    """Halves the size and doubles the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.merging = PatchMergingV2(channels, spatial_dims=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.merging(x.movedim(1, -1)).movedim(-1, 1)


class Expand(nn.Module):
    """Multiplies the size by ``factor`` with a linear layer, whose channels become pixels."""

    def __init__(self, channels: int, out_channels: int, *, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(channels, factor**2 * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        pattern = "b h w (i j c) -> b (h i) (w j) c"
        x = rearrange(self.linear(x.movedim(1, -1)), pattern, i=self.factor, j=self.factor)
        return self.norm(x).movedim(-1, 1)


class Norm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SwinUNet(nn.Module):
    """Patches of 4x4 pixels, three stages and a bottleneck of two Swin blocks each, and three stages upwards.

    Its weights start at random, whereas the paper takes weights from ImageNet. It has no stochastic depth.
    ``embed_dim``, 96 in the paper, is a multiple of 3.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 4, *, embed_dim: int = 96) -> None:
        super().__init__()
        widths = [embed_dim * 2**level for level in range(4)]
        first: nn.Module = PatchEmbed(4, in_channels, embed_dim, spatial_dims=2)
        downs = [first, *(Merge(width) for width in widths[:-1])]
        stages = [nn.Sequential(down, swin_blocks(level, embed_dim)) for level, down in enumerate(downs)]
        stages[-1].append(Norm(widths[-1]))
        self.encoder = KAFEncoder(stages, [None] * 4)
        self.ups, self.fuse, self.blocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in (2, 1, 0):
            self.ups.append(Expand(widths[level + 1], widths[level]))
            self.fuse.append(nn.Conv2d(2 * widths[level], widths[level], 1))
            self.blocks.append(swin_blocks(level, embed_dim))
        self.norm = Norm(embed_dim)
        self.last = Expand(embed_dim, embed_dim, factor=4)
        self.head = nn.Conv2d(embed_dim, num_classes, 1, bias=False)

    def forward(self, images: Tensor, keypoints: Keypoints | None = None) -> Tensor:  # noqa: ARG002
        """Images (B, C, H, W), H and W divisible by 32, to logits (B, num_classes, H, W)."""
        if images.shape[2] % 32 or images.shape[3] % 32:
            raise ValueError(f"the image's height and width must be divisible by 32, got {images.shape=}")
        *skips, x = self.encoder(images).features
        for up, fuse, blocks, skip in zip(self.ups, self.fuse, self.blocks, reversed(skips), strict=True):
            x = blocks(fuse(torch.cat([up(x), skip], dim=1)))
        return self.head(self.last(self.norm(x)))
