"""The paper's UNet (Section 4), plain, wider (c2) and with KAF layers: copy and adapt it.

logits = KAFUNet(in_channels=1, num_classes=4)(images, SIFTDetector()(images))
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kaf_layer import KAFEncoder, KAFLayer, KAFOutput, Keypoints


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.LeakyReLU(inplace=True)
    )


class Decoder(nn.Module):
    """For each level: doubles the size, concatenates the encoder's map of that size, and convolves twice."""

    def __init__(self, skip_channels: Sequence[int], widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for skip, width, deeper in reversed(list(zip(skip_channels, widths[:-1], widths[1:], strict=True))):
            self.ups.append(nn.ConvTranspose2d(deeper, width, 2, stride=2))
            self.blocks.append(nn.Sequential(conv_block(width + skip, width), conv_block(width, width)))
        self.head = nn.Conv2d(widths[0], num_classes, 1, bias=False)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        *skips, x = features
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips), strict=True):
            x = block(torch.cat([up(x), skip], dim=1))
        return self.head(x)


class UNet(nn.Module):
    """Encoder blocks, each except the deepest followed by a layer if there is one, and a decoder block for each.

    ``layers`` are modules from (map, keypoints) to (fused map, tokens) with ``fused_channels``; there is one block
    more than layers, five in the paper. Where layers concatenate, the decoder and the deepest block are twice as wide,
    as in the authors' code.
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
        *shallow, deep = (width * 2**i for i in range(len(layers) + 1))
        # Any, since the attributes of a module have no narrower type.
        fused: list[Any] = [
            w if layer is None else layer.fused_channels for w, layer in zip(shallow, layers, strict=True)
        ]
        factor = 1 if fused == shallow else 2
        stages: list[nn.Module] = [
            nn.Sequential(nn.MaxPool2d(2) if i else nn.Identity(), conv_block(before, w), conv_block(w, w))
            for i, (before, w) in enumerate(zip([in_channels, *fused], shallow, strict=False))
        ]
        deepest = factor * deep
        stages.append(
            nn.Sequential(
                nn.MaxPool2d(2),
                nn.Conv2d(fused[-1], deepest, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(deepest, deepest, 3, padding=1),
                nn.ReLU(inplace=True),
            )
        )
        self.encoder = KAFEncoder(stages, [*layers, None])
        self.decoder = Decoder(fused, [factor * w for w in (*shallow, deep)], num_classes)

    def forward(self, images: Tensor, keypoints: Keypoints | None = None) -> Tensor:
        """Images (B, C, H, W), H and W divisible by 16 (with five blocks), to logits (B, num_classes, H, W)."""
        divisor = 2 ** len(self.decoder.blocks)
        if images.shape[2] % divisor or images.shape[3] % divisor:
            raise ValueError(f"the image's height and width must be divisible by {divisor}, got {images.shape=}")
        return self.decoder(self.encoder(images, keypoints).features)


class Repeat(nn.Module):
    """Concatenates a map with itself. The following convolutions are then as wide as with a KAF layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fused_channels = 2 * channels

    def forward(self, features: Tensor, _keypoints: Keypoints | None) -> KAFOutput:
        return KAFOutput(torch.cat([features, features], dim=1), features.new_zeros(len(features), 0, 0))


class UNetC2(UNet):
    """The paper's control "UNet (c2)": the convolutions of the KAF-UNet, without attention."""

    def __init__(self, in_channels: int = 1, num_classes: int = 4, *, width: int = 32, levels: int = 5) -> None:
        layers = [Repeat(width * 2**i) for i in range(levels - 1)]
        super().__init__(in_channels, num_classes, width=width, layers=layers)


class KAFUNet(UNet):
    """The UNet with a KAF layer after each encoder block except the deepest. ``options`` are those of KAFLayer."""

    def __init__(
        self, in_channels: int = 1, num_classes: int = 4, *, width: int = 32, levels: int = 5, **options: Any
    ) -> None:
        layers = [KAFLayer(width * 2**i, **options) for i in range(levels - 1)]
        super().__init__(in_channels, num_classes, width=width, layers=layers)
