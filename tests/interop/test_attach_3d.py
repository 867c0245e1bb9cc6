"""attach on MONAI's networks for volumes: their own output until trained, layers that learn, keypoints from SIFT."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kaf_layer import SIFTDetector
from kaf_layer.interop import KAFBackbone, attach

nets = pytest.importorskip("monai.networks.nets")

pytestmark = pytest.mark.usefixtures("on_device")
SMALL = {"embed_dim": 8, "depth": 1, "num_heads": 2, "hidden_channels": 4}


def deep_supervision() -> nn.Module:
    return nets.DynUNet(3, 1, 2, [3] * 3, [1, (1, 2, 2), 2], [(1, 2, 2), 2], filters=[4, 8, 16], deep_supervision=True)


# The network, the channels of maps in it, and the size of its volumes.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], tuple[int, int, int]]] = {
    "UNet": (
        lambda: nets.UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1),
        {"model.0": 4, "model.1.submodule.0": 8, "model.2": 2},
        (12, 16, 24),
    ),
    "SegResNet": (
        lambda: nets.SegResNet(3, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        {"convInit": 8, "down_layers.1": 16, "up_layers.1": 8},
        (12, 16, 24),
    ),
    "DynUNet": (deep_supervision, {"input_block": 4, "downsamples.0": 8, "upsamples.1": 4}, (6, 16, 24)),
    "SwinUNETR": (
        lambda: nets.SwinUNETR(1, 2, feature_size=12, depths=(1,) * 4, window_size=2, spatial_dims=3),
        {"swinViT.patch_embed": 12, "swinViT.layers1.0": 24, "encoder1": 12},
        (32, 64, 32),
    ),
}


def attached(name: str, backbone: nn.Module, **options: object) -> KAFBackbone:
    detector = SIFTDetector(
        32, spatial_dims=3, contrast_threshold=0.0, edge_threshold=30.0, descriptors=False, **options
    )
    return attach(backbone, NETWORKS[name][1], detector=detector, spatial_dims=3, **SMALL)


def first(output: Tensor | list[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor]:
    torch.manual_seed(0)
    build, _, size = NETWORKS[request.param]
    return request.param, build(), torch.rand(2, 1, *size)


def test_the_networks_own_output_then_one_that_follows_the_keypoints(case: tuple[str, nn.Module, Tensor]) -> None:
    name, backbone, volumes = case
    model = attached(name, backbone.eval())
    with torch.no_grad():
        expected = first(backbone(volumes))
        assert torch.equal(first(model(volumes)), expected)
        for layer in model.layers.values():
            nn.init.ones_(layer.gain)
        keypoints = model.detector(volumes)
        assert keypoints.valid.any(1).all()
        changed = first(model(volumes, keypoints=keypoints))
        assert not torch.allclose(changed, expected, atol=1e-4)
        assert not torch.allclose(first(model(volumes, keypoints=keypoints[[1, 0]])), changed, atol=1e-4)
        assert torch.equal(first(model.remove_layers()(volumes)), expected)


def test_layers_learn_behind_a_frozen_network(case: tuple[str, nn.Module, Tensor]) -> None:
    name, backbone, volumes = case
    model = attached(name, backbone.train(), spacing=(2.0, 1.0, 1.0))
    model.backbone.requires_grad_(False)
    first(model(volumes)).square().mean().backward()
    assert all(layer.gain.grad.isfinite().all() and layer.gain.grad.any() for layer in model.layers.values())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_sift_is_the_detector_of_volumes_too() -> None:
    volumes = torch.rand(1, 1, 12, 16, 24)
    model = attach(nets.UNet(3, 1, 2, (4, 8), (2,)), ["model.0"], example=volumes, **SMALL)
    assert model.detector(volumes).image_size == (12, 16, 24)
