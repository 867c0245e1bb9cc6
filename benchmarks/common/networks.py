"""The networks that flops.py and memory.py compare, by name. Each is built from its number of self-attentions.

A network of another library imports that library when it is built, so a missing library affects no other network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from examples.unet import KAFUNet
from examples.unet3d import KAFUNet3d
from kaf_layer import KAFLayer, KeypointDiffusion, Keypoints
from kaf_layer.attention import BlockType, TransformerBlock

KEYPOINTS = 500
WIDTH = 32
SCALES = 4


class Network(nn.Module):
    """A network to compare. It maps its ``inputs`` to feature maps; ``configuration`` describes it in a table."""

    configuration: str
    spatial_dims = 2

    def inputs(self, edge: int, batch: int = 1) -> tuple[object, ...]:
        """Returns inputs for images or volumes of this edge on the default device. Here they are the images."""
        return (torch.rand(batch, 1, *(edge,) * self.spatial_dims),)


def keypoints(edge: int, batch: int = 1, spatial_dims: int = 2) -> Keypoints:
    """Draws keypoints uniformly in images or volumes of this edge."""
    positions, size = torch.rand(batch, KEYPOINTS, spatial_dims) * edge, (edge,) * spatial_dims
    return Keypoints(positions, torch.ones(batch, KEYPOINTS, dtype=torch.bool), size, padded=False)


class KAFLayers(Network):
    """The KAF layers of a UNet's four scales without the UNet. Their inputs are its maps, which need gradients."""

    def __init__(
        self, attentions: int, *, block: BlockType = "transformer", dense: bool = False, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        depth, self.spatial_dims = attentions // SCALES, spatial_dims
        layers = [KAFLayer(WIDTH * 2**i, depth=depth, block=block, spatial_dims=spatial_dims) for i in range(SCALES)]
        self.layers = nn.ModuleList(layers)
        if dense:
            for layer in layers:
                layer.diffusion.method = "dense"
        diffusion = "dense diffusion" if dense else "diffusion where the keypoints are"
        self.configuration = (
            f"{KEYPOINTS} keypoints, 32 to 256 channels at strides 1 to 8, {depth} {block} blocks on each scale, "
            f"embedding 256, {diffusion}"
        )

    def inputs(self, edge: int, batch: int = 1) -> tuple[object, ...]:
        sizes = [(batch, WIDTH * 2**i, *(edge // 2**i,) * self.spatial_dims) for i in range(SCALES)]
        return [torch.rand(size, requires_grad=True) for size in sizes], keypoints(edge, batch, self.spatial_dims)

    def forward(self, maps: list[Tensor], points: Keypoints) -> list[Tensor]:
        return [layer(features, points).features for layer, features in zip(self.layers, maps, strict=True)]


class Diffusion(Network):
    """The diffusion alone, on the finest map of a volume. It has no attention."""

    spatial_dims = 3

    def __init__(self, _attentions: int, *, dense: bool = False) -> None:
        super().__init__()
        self.diffusion = KeypointDiffusion(256, WIDTH, spatial_dims=3)
        if dense:
            self.diffusion.method = "dense"
        self.configuration = f"{KEYPOINTS} keypoints of 256 channels to a map of {WIDTH}, 64 between"

    def inputs(self, edge: int, batch: int = 1) -> tuple[object, ...]:
        return torch.rand(batch, KEYPOINTS, 256, requires_grad=True), keypoints(edge, batch, 3), (edge,) * 3

    def forward(self, tokens: Tensor, points: Keypoints, size: tuple[int, ...]) -> list[Tensor]:
        return [self.diffusion(tokens, points, size)]


class KAFUNetEncoder(Network):
    """The whole encoder of the KAF-UNet: its KAF layers and the convolutions around them."""

    def __init__(self, attentions: int, *, spatial_dims: int = 2) -> None:
        super().__init__()
        depth, self.spatial_dims = attentions // SCALES, spatial_dims
        if spatial_dims == 2:
            self.encoder = KAFUNet(width=WIDTH, depth=depth).encoder
        else:
            self.encoder = KAFUNet3d(width=WIDTH, strides=(2,) * SCALES, depth=depth).encoder
        self.configuration = f"the KAF layers and all convolutions of the KAF-UNet's encoder, width {WIDTH}"

    def inputs(self, edge: int, batch: int = 1) -> tuple[object, ...]:
        return *super().inputs(edge, batch), keypoints(edge, batch, self.spatial_dims)

    def forward(self, image: Tensor, points: Keypoints) -> list[Tensor]:
        return self.encoder(image, points).features


class Swin(Network):
    """MONAI's SwinTransformer."""

    def __init__(self, *, patch_size: int, embed_dim: int, depths: tuple[int, ...], spatial_dims: int = 2) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer

        super().__init__()
        self.spatial_dims = spatial_dims
        # MONAI reads its drop path rates, all zero, from a tensor. A fake tensor has no values.
        with patch("torch.linspace", np.linspace):
            self.swin = SwinTransformer(
                in_chans=1,
                embed_dim=embed_dim,
                window_size=(7,) * spatial_dims,
                patch_size=(patch_size,) * spatial_dims,
                depths=depths,
                num_heads=(3, 6, 12, 24),
                spatial_dims=spatial_dims,
            )
        self.configuration = (
            f"MONAI SwinTransformer, patch {patch_size}, embedding {embed_dim}, window 7, heads (3, 6, 12, 24), "
            f"depths {depths}"
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.swin(image)


def swin_t(attentions: int) -> Swin:
    """Swin-T, of depths (2, 2, 6, 2), made deeper in its third stage, as in Swin-S (Liu et al., 2021)."""
    return Swin(patch_size=4, embed_dim=96, depths=(2, 2, attentions - 6, 2))


def swin_unetr(attentions: int, *, embed_dim: int = 48, spatial_dims: int = 2) -> Swin:
    """The encoder of SwinUNETR (Hatamizadeh et al., 2022) with equally deep stages."""
    return Swin(patch_size=2, embed_dim=embed_dim, depths=(attentions // 4,) * 4, spatial_dims=spatial_dims)


class TorchvisionSwin(Network):
    """torchvision's Swin-T, made deeper as in ``swin_t``. It takes three channels."""

    def __init__(self, attentions: int) -> None:
        import examples.torchvision_operators  # noqa: F401  # before torchvision

        # isort: split
        from torchvision.models.swin_transformer import SwinTransformer

        super().__init__()
        depths = [2, 2, attentions - 6, 2]
        with patch("torch.nn.init.trunc_normal_"):  # it reads values, which a fake tensor does not have
            self.features = SwinTransformer(
                [4, 4], 96, depths, [3, 6, 12, 24], [7, 7], stochastic_depth_prob=0.0
            ).features
        self.configuration = f"torchvision SwinTransformer, patch 4, embedding 96, window 7, depths {tuple(depths)}"

    def inputs(self, edge: int, batch: int = 1) -> tuple[object, ...]:
        return (torch.rand(batch, 3, edge, edge),)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [self.features(image)]


class GlobalAttention(Network):
    """All pixels of the UNet's deepest map attend to each other, in the same blocks as our keypoints."""

    def __init__(self, attentions: int) -> None:
        super().__init__()
        channels, embed_dim = WIDTH * 2**SCALES, 256
        self.embed = nn.Linear(channels, embed_dim)
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim) for _ in range(attentions))
        self.out = nn.Linear(embed_dim, channels)
        self.configuration = (
            f"every pixel of {channels} channels at stride 16, {attentions} transformer blocks, embedding {embed_dim}"
        )

    def inputs(self, edge: int, batch: int = 1) -> tuple[object, ...]:
        side = edge // 2**SCALES
        return (torch.rand(batch, WIDTH * 2**SCALES, side, side, requires_grad=True),)

    def forward(self, features: Tensor) -> list[Tensor]:
        tokens = self.embed(features.flatten(2).mT)
        for block in self.blocks:
            tokens = block(tokens, None, None)
        return [self.out(tokens).mT.view_as(features)]


NETWORKS: dict[str, Callable[[int], Network]] = {
    "KAF layers": KAFLayers,
    "KAF layers, the paper's block": lambda attentions: KAFLayers(attentions, block="propagation"),
    "KAF layers, dense": lambda attentions: KAFLayers(attentions, block="propagation", dense=True),
    "Swin-T": swin_t,
    "SwinUNETR": swin_unetr,
    "SwinUNETR, embedding 24": lambda attentions: swin_unetr(attentions, embed_dim=24),
    "global attention": GlobalAttention,
    "KAF-UNet's encoder": KAFUNetEncoder,
    "Swin-T of torchvision": TorchvisionSwin,
}


VOLUMETRIC: dict[str, Callable[[int], Network]] = {
    "KAF layers": partial(KAFLayers, spatial_dims=3),
    "KAF layers, the paper's block": partial(KAFLayers, block="propagation", spatial_dims=3),
    "KAF layers, dense": partial(KAFLayers, block="propagation", dense=True, spatial_dims=3),
    "diffusion alone": Diffusion,
    "diffusion alone, dense": partial(Diffusion, dense=True),
    "SwinUNETR": partial(swin_unetr, spatial_dims=3),
    "SwinUNETR, embedding 24": partial(swin_unetr, embed_dim=24, spatial_dims=3),
    "KAF-UNet's encoder": partial(KAFUNetEncoder, spatial_dims=3),
}


def build_all(
    builders: dict[str, Callable[[int], Network]], attentions: int
) -> tuple[dict[str, Network], dict[str, str]]:
    """Returns the networks by name and, for those that cannot be built, the reason."""
    networks, reasons = {}, {}
    for name, build in builders.items():
        try:
            networks[name] = build(attentions)
        except Exception as error:  # noqa: PERF203  # a missing or broken library can raise anything
            reasons[name] = reason_of(error)
    return networks, reasons


def reason_of(error: Exception) -> str:
    """Returns one line that says why a network was not measured."""
    return f"not measured: {type(error).__name__}: {' '.join(str(error).split())}"


def backward(features: list[Tensor]) -> None:
    """Runs the backward pass of the sum over all maps."""
    torch.stack([feature.sum() for feature in features]).sum().backward()
