"""The shapes in annotations are true: the package runs in the plane and in space while each of them is checked."""

import inspect
from collections.abc import Iterator
from typing import Annotated

import jaxtyping
import kornia.augmentation as K
import pytest
import torch
from common import random_keypoints
from shapes import check_shapes, with_shapes
from torch import Tensor

import kaf_layer
from kaf_layer import KAFLayer, KAFPretrainingLoss, Keypoints, SIFTDetector
from kaf_layer.detection.sift import neighbours

SMALL = {"embed_dim": 8, "depth": 2, "num_heads": 2, "hidden_channels": 3}
SIZES = [(12, 20), (4, 6, 8)]


@pytest.fixture(autouse=True)
def checked() -> Iterator[list[str]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield check_shapes(monkeypatch)


def floats(image_size: tuple[int, ...], counts: tuple[int, ...] = (7, 0, 4, 5)) -> Keypoints:
    return random_keypoints(image_size, counts, dtype=torch.float32, garbage=0.0)


def test_a_wrong_shape_is_found() -> None:
    def swapped(x: Annotated[Tensor, "B N E"]) -> Annotated[Tensor, "B E N"]:
        return x

    def grown(x: Annotated[Tensor, "N_a"], _: Annotated[Tensor, "2N_a"]) -> Annotated[Tensor, "N_a+1 3^D"]:
        return torch.cat([x, x[:1]])[:, None]

    with_shapes(swapped)(torch.zeros(2, 3, 3))
    with pytest.raises(jaxtyping.TypeCheckError, match="swapped"):
        with_shapes(swapped)(torch.zeros(2, 3, 4))
    with_shapes(grown)(torch.zeros(3), torch.zeros(6))
    with pytest.raises(jaxtyping.TypeCheckError, match="grown"):
        with_shapes(grown)(torch.zeros(3), torch.zeros(5))


def test_all_modules_are_checked(checked: list[str]) -> None:
    assert {name.split(".")[1] for name in checked} >= {
        "attention", "augmentation", "detection", "diffusion", "encoder", "keypoints", "layer", "losses", "matching",
        "normalization", "positions", "sampling", "scattering",
    }  # fmt: skip
    assert "with_shapes" not in inspect.getsource(kaf_layer.sample_keypoints)


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("method", ["rows", "hybrid", "dense"])
def test_layers(image_size: tuple[int, ...], method: str) -> None:
    keypoints, map_size = floats(image_size), tuple(size // 2 for size in image_size)
    options = {"rows": {"position": "both"}, "hybrid": {"block": "propagation"}, "dense": {"reduce": "amax"}}[method]
    layer = KAFLayer(4, out_channels=3, spatial_dims=len(image_size), **SMALL, **options)
    layer.diffusion.method = method
    features, tokens = layer(torch.randn(4, 4, *map_size), keypoints)
    assert (features.shape, tokens.shape) == ((4, 7, *map_size), (*keypoints.valid.shape, 8))


@pytest.mark.parametrize("image_size", SIZES)
def test_losses(image_size: tuple[int, ...]) -> None:
    keypoints = floats(image_size)
    descriptors = torch.randn(*keypoints.valid.shape, 16)
    keypoints = Keypoints(keypoints.positions, keypoints.valid, image_size, descriptors=descriptors)
    loss = KAFPretrainingLoss(6, 8, embed_dim=8, num_heads=2, iterations=3, spatial_dims=len(image_size))
    matches = kaf_layer.match_keypoints(keypoints[:2], keypoints[2:])
    bottleneck, tokens = torch.randn(4, 6, *[2] * len(image_size)), torch.randn(*keypoints.valid.shape, 8)
    assert loss(bottleneck, torch.rand(4), [tokens], keypoints, matches).total.isfinite()


@pytest.mark.parametrize("size", [(40, 48), (16, 18, 20)])
def test_detection(size: tuple[int, ...]) -> None:
    detector = SIFTDetector(8, spatial_dims=len(size))
    assert detector(torch.rand(2, 1, *size)).descriptors is not None
    assert neighbours.extremal_strength(torch.rand(1, 6, *size), border=2).shape[1] == 3  # of a GPU's detector
    assert kaf_layer.GridDetector(6)(torch.rand(2, 1, *size)).spatial_dims == len(size)


def test_augmentation() -> None:
    images, keypoints = torch.rand(4, 1, 12, 20), floats((12, 20))
    labels = torch.zeros(4, 12, 20, dtype=torch.long)
    augment = kaf_layer.KeypointAugmentation(K.RandomRotation(20.0, p=1.0), K.RandomElasticTransform(p=1.0))
    assert augment(images, keypoints, labels).keypoints.valid.shape == keypoints.valid.shape
