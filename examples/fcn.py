"""The paper's FCN (Section 4): VGG blocks of two convolutions each, with and without KAF layers.

python examples/fcn.py
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unet import conv_block

from kaf_layer import KAFEncoder, KAFLayer, Keypoints


class FCN(nn.Module):
    """Blocks, each but the last followed by its layer, if any; the last three vote (FCN-8s).

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
        fused = [w if layer is None else layer.fused_channels for w, layer in zip(widths, [*layers, None], strict=True)]
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
    """The FCN with a KAF layer after each of the first four blocks; ``options`` are KAFLayer's."""

    def __init__(self, in_channels: int = 1, num_classes: int = 4, *, width: int = 32, **options: Any) -> None:
        layers = [KAFLayer(width * 2**i, **options) for i in range(4)]
        super().__init__(in_channels, num_classes, width=width, layers=layers)


def main() -> None:
    images = torch.rand(2, 1, 90, 130)
    keypoints = Keypoints(torch.rand(2, 50, 2) * torch.tensor([130, 90]), torch.ones(2, 50).bool(), (90, 130))
    for name, model in {"FCN": FCN(), "KAF-FCN": KAFFCN()}.items():
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {parameters:,} parameters, logits {tuple(model(images, keypoints).shape)}")


if __name__ == "__main__":
    main()
