"""A KAF-UNet for volumes, made of MONAI's blocks: copy and adapt it.

python examples/unet3d.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution, UnetBasicBlock, UnetUpBlock
from torch import Tensor, nn

from kaf_layer import KAFEncoder, KAFLayer, KAFOutput, Keypoints, SIFTDetector

BLOCK: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "batch"}


class UNet3d(nn.Module):
    """Encoder blocks, each except the deepest followed by a layer if there is one, and a decoder block for each.

    ``layers`` are modules from (map, keypoints) to (fused map, tokens) with ``fused_channels``. ``strides`` says by
    how much each block divides the axes (D, H, W) of the map before it: leave thick slices at 1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        width: int = 16,
        strides: Sequence[Sequence[int] | int] = (2, 2, 2),
        layers: Sequence[nn.Module | None] | None = None,
    ) -> None:
        super().__init__()
        layers = [None] * len(strides) if layers is None else layers
        self.strides = [(stride,) * 3 if isinstance(stride, int) else tuple(stride) for stride in strides]
        widths = [width * 2**i for i in range(len(strides) + 1)]
        fused = [w if layer is None else layer.fused_channels for w, layer in zip(widths, [*layers, None], strict=True)]
        stages = [
            UnetBasicBlock(in_channels=before, out_channels=w, stride=stride, **BLOCK)
            for before, w, stride in zip([in_channels, *fused], widths, [1, *self.strides], strict=False)
        ]
        self.encoder = KAFEncoder(stages, [*layers, None])
        # MONAI's block joins two maps of the same width, so fused maps are brought to that width.
        self.skips = nn.ModuleList(
            nn.Identity() if f == w else Convolution(3, f, w, kernel_size=1, act="relu", norm="batch")
            for f, w in zip(fused[:-1], widths, strict=False)
        )
        self.ups = nn.ModuleList(
            UnetUpBlock(in_channels=deep, out_channels=w, stride=1, upsample_kernel_size=stride, **BLOCK)
            for w, deep, stride in zip(widths, widths[1:], self.strides, strict=False)
        )
        self.head = nn.Conv3d(width, num_classes, 1)

    def forward(self, volumes: Tensor, keypoints: Keypoints | None = None) -> Tensor:
        """Volumes (B, C, D, H, W) to logits (B, num_classes, D, H, W)."""
        divisors = torch.tensor(self.strides).prod(0).tolist()
        if any(size % divisor for size, divisor in zip(volumes.shape[2:], divisors, strict=True)):
            raise ValueError(f"the volume's axes must be divisible by {divisors}, got {volumes.shape=}")
        *maps, x = self.encoder(volumes, keypoints).features
        for up, skip, features in reversed(list(zip(self.ups, self.skips, maps, strict=True))):
            x = up(x, skip(features))
        return self.head(x)


class Repeat(nn.Module):
    """Concatenates a map with itself. The following convolutions are then as wide as with a KAF layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fused_channels = 2 * channels

    def forward(self, features: Tensor, _keypoints: Keypoints | None) -> KAFOutput:
        return KAFOutput(torch.cat([features, features], dim=1), features.new_zeros(len(features), 0, 0))


class UNet3dC2(UNet3d):
    """The paper's control "UNet (c2)" for volumes: the convolutions of the KAF-UNet, without attention."""

    def __init__(
        self, in_channels: int = 1, num_classes: int = 4, *, width: int = 16, strides: Sequence[Any] = (2, 2, 2)
    ) -> None:
        layers = [Repeat(width * 2**i) for i in range(len(strides))]
        super().__init__(in_channels, num_classes, width=width, strides=strides, layers=layers)


class KAFUNet3d(UNet3d):
    """The UNet with a KAF layer after each encoder block except the deepest. ``options`` are those of KAFLayer."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        width: int = 16,
        strides: Sequence[Any] = (2, 2, 2),
        **options: Any,
    ) -> None:
        layers = [KAFLayer(width * 2**i, spatial_dims=3, **options) for i in range(len(strides))]
        super().__init__(in_channels, num_classes, width=width, strides=strides, layers=layers)


def main() -> None:
    volumes = torch.rand(1, 1, 12, 48, 40)
    thick: dict[str, Any] = {"strides": [(1, 2, 2), (1, 2, 2), 2]}  # for slices four times as thick as a pixel is wide
    keypoints = SIFTDetector(64, spatial_dims=3, spacing=(4.0, 1.0, 1.0), descriptors=False)(volumes)
    networks = {"UNet": UNet3d(**thick), "UNet (c2)": UNet3dC2(**thick), "KAF-UNet": KAFUNet3d(depth=2, **thick)}
    for name, model in networks.items():
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {parameters:,} parameters, logits {tuple(model(volumes, keypoints).shape)}")


if __name__ == "__main__":
    main()
