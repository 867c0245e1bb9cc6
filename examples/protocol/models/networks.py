"""The networks that ``--model`` names, from (images, keypoints) to logits."""

import torch
from torch import Tensor, nn

from examples.fcn import FCN
from examples.protocol.options import Options
from examples.unet import UNet, UNetC2
from examples.unet3d import UNet3d, UNet3dC2
from kaf_layer import KAFEncoderOutput, KAFLayer, Keypoints

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def build_model(options: Options) -> nn.Module:
    """The network that options name, with an ``encoder`` from (images, keypoints) to KAFEncoderOutput."""
    network = _build_network(options)
    if options.channels_last:  # convolutions pass on the format of their weights, so batches need not have it
        network.to(memory_format=CHANNELS_LAST[options.spatial_dims])  # type: ignore[call-overload]  # of torch's stubs
    return network


def _build_network(options: Options) -> nn.Module:
    classes, width = options.classes, options.width
    if options.model == "swin-unetr":
        from monai.networks.nets import SwinUNETR

        features = 12 * -(-width // 8)  # a multiple of 12, which is 48 for a UNet of width 32
        dims, window = options.spatial_dims, options.window
        return WithoutKeypoints(SwinUNETR(1, classes, feature_size=features, spatial_dims=dims, window_size=window))
    if options.model == "swin-unet":
        from examples.swin_unet import SwinUNet

        return SwinUNet(1, classes, embed_dim=3 * width)  # the paper's 96 for a UNet of width 32
    if options.model == "unet-c2" and options.spatial_dims == 3:
        return UNet3dC2(1, classes, width=width, strides=[2] * (options.levels - 1))
    if options.model == "unet-c2":
        return UNetC2(1, classes, width=width, levels=options.levels)
    chosen = options.scales if options.model.startswith("kaf") else ()
    with torch.random.fork_rng():  # the other weights start as they do without layers, for paired comparisons
        layers = [build_layer(width * 2**i, options) if i in chosen else None for i in range(options.levels - 1)]
    if options.share_attention:
        for layer in filter(None, layers):
            layer.transformer = next(filter(None, layers)).transformer
    if options.spatial_dims == 3:
        return UNet3d(1, classes, width=width, strides=[2] * len(layers), layers=layers)
    return (FCN if options.model.endswith("fcn") else UNet)(1, classes, width=width, layers=layers)


def build_layer(channels: int, options: Options) -> KAFLayer:
    return KAFLayer(
        channels,
        embed_dim=options.embed_dim,
        depth=options.depth,
        fusion=options.fusion,
        position=options.position,
        spatial_dims=options.spatial_dims,
    )


class WithoutKeypoints(nn.Module):
    """Makes a network that takes only images accept keypoints too, which it ignores."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, keypoints: Keypoints) -> Tensor:  # noqa: ARG002
        return self.network(images)

    @property
    def encoder(self) -> "SwinEncoder":
        return SwinEncoder(self.network.get_submodule("swinViT"))


class SwinEncoder(nn.Module):
    """The Swin Transformer of a SwinUNETR as an encoder."""

    def __init__(self, swin: nn.Module) -> None:
        super().__init__()
        self.swin = swin

    def forward(self, images: Tensor, keypoints: Keypoints | None = None) -> KAFEncoderOutput:  # noqa: ARG002
        return KAFEncoderOutput(self.swin(images), [])


def weights_of(network: nn.Module, parts: list[nn.Module]) -> dict[str, Tensor]:
    """The part of a network's state dict that belongs to some of its modules."""
    chosen = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    state = network.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if id(tensor) in chosen}
