"""The paper's FCN (Section 4): VGG blocks with two convolutions each, with and without KAF layers.

logits = KAFFCN(in_channels=1, num_classes=4)(images, SIFTDetector()(images))
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kaf_layer import KAFEncoder, KAFLayer, Keypoints


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.LeakyReLU(inplace=True)
    )


class FCN(nn.Module):
    """Blocks, each except the last followed by a layer if there is one. The last three blocks vote (FCN-8s).

    ``layers`` are modules from (map, keypoints) to (fused map, tokens) with ``fused_channels``; there is one block
    more than layers, five in the paper.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        width: int = 32,
        layers: Sequence[nn.Module | None] = (None,) * 4,
    ) -> None:
        super().__init__()
        widths = [width * 2 ** min(i, 3) for i in range(len(layers) + 1)]
        each = zip(widths, [*layers, None], strict=True)
        # Any, since the attributes of a module have no narrower type.
        fused: list[Any] = [w if layer is None else layer.fused_channels for w, layer in each]
        stages = [
            nn.Sequential(nn.MaxPool2d(2) if i else nn.Identity(), conv_block(before, w), conv_block(w, w))
            for i, (before, w) in enumerate(zip([in_channels, *fused[:-1]], widths, strict=True))
        ]
        self.encoder = KAFEncoder(stages, [*layers, None])
        self.votes = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for channels in fused[-3:])

    def forward(self, images: Tensor, keypoints: Keypoints | None = None) -> Tensor:
        """Images (B, C, H, W) of at least 16x16 pixels to logits (B, num_classes, H, W)."""
        features = self.encoder(images, keypoints).features
        *shallower, logits = [vote(x) for vote, x in zip(self.votes, features[-3:], strict=True)]
        for vote in reversed(shallower):
            logits = vote + F.interpolate(logits, vote.shape[2:], mode="bilinear")
        return F.interpolate(logits, images.shape[2:], mode="bilinear")


class KAFFCN(FCN):
    """The FCN with a KAF layer after each of the first four blocks. ``options`` are those of KAFLayer."""

    def __init__(self, in_channels: int = 1, num_classes: int = 4, *, width: int = 32, **options: Any) -> None:
        layers = [KAFLayer(width * 2**i, **options) for i in range(4)]
        super().__init__(in_channels, num_classes, width=width, layers=layers)
