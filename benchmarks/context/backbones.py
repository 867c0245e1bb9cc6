"""The networks that layers are attached to, each with the submodules that layers follow and their widths."""

from collections.abc import Callable

import torch
from torch import nn

Backbone = tuple[nn.Module, dict[str, int]]
CHANNELS = {"sunnybrook": (8, 16, 32), "lumbar": (8, 16, 32, 64)}  # of MONAI's UNet, by preset


def monai_unet(preset: str, classes: int) -> Backbone:
    """MONAI's UNet, and all of its scales except the coarsest."""
    from monai.networks.nets import UNet

    channels = CHANNELS[preset]
    unet = UNet(2, in_channels=1, out_channels=classes, channels=channels, strides=(2,) * (len(channels) - 1))
    return unet, {f"model.{'1.submodule.' * i}0": width for i, width in enumerate(channels[:-1])}


def smp_unet(preset: str, classes: int) -> Backbone:  # noqa: ARG001  # the same for every data set
    """A UNet of segmentation-models-pytorch: a ResNet-18 cut at a stride of 8, and its scales except the coarsest."""
    import examples.torchvision_operators  # noqa: F401  # only needed beside a CPU build of torch

    # isort: split
    import segmentation_models_pytorch as smp

    unet = smp.Unet(
        "resnet18",
        encoder_depth=3,
        encoder_weights=None,
        decoder_channels=(64, 32, 16),
        in_channels=1,
        classes=classes,
    )
    return unet, {"encoder.relu": 64, "encoder.layer1": 64}


NETWORKS: dict[str, Callable[[str, int], Backbone]] = {"monai": monai_unet, "smp": smp_unet}
TITLES = {"monai": "MONAI's UNet", "smp": "an smp UNet with a ResNet-18"}


def build(network: str, preset: str, classes: int, *, seed: int) -> Backbone:
    """Builds a network with random weights."""
    torch.manual_seed(seed)
    return NETWORKS[network](preset, classes)
