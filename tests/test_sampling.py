"""KeypointSampler against loops over keypoints, and against torch's grid_sample."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from common import random_keypoints
from torch import Tensor

from kaf_layer import Keypoints, KeypointSampler, sample_keypoints

SIZES = [((12, 20), (6, 10)), ((12, 20), (12, 20)), ((9, 7), (1, 4)), ((5, 6), (10, 12)), ((4, 6, 8), (2, 6, 4))]


def loop(features: Tensor, keypoints: Keypoints, mode: str) -> Tensor:
    size, image_size = features.shape[2:], keypoints.image_size
    result = features.new_zeros(*keypoints.valid.shape, features.shape[1])
    for sample, slot in keypoints.valid.nonzero().tolist():
        position = []
        for p, s, image in zip(keypoints.positions[sample, slot].tolist()[::-1], size, image_size, strict=True):
            q = (p + 0.5) * s / image - 0.5
            q = math.floor(q + 0.5) if mode == "nearest" else q
            position.append(min(max(q, 0), s - 1))
        for cell in itertools.product(*map(range, size)):
            weight = math.prod(max(0.0, 1 - abs(q - c)) for q, c in zip(position, cell, strict=True))
            result[sample, slot] += weight * features[(sample, slice(None), *cell)]
    return result


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize(("image_size", "size"), SIZES)
def test_against_a_loop(image_size: tuple[int, ...], size: tuple[int, ...], mode: str) -> None:
    keypoints = random_keypoints(image_size, (6, 0, 3))
    keypoints.positions[0] += 3  # some leave the image
    features = torch.rand(3, 5, *size, dtype=torch.float64)
    torch.testing.assert_close(KeypointSampler(mode)(features, keypoints), loop(features, keypoints, mode))


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_unmasked_slots_hold_the_first_cell(mode: str) -> None:
    keypoints = random_keypoints((12, 20), (3, 0))
    features = torch.rand(2, 5, 6, 10, dtype=torch.float64)
    actual = KeypointSampler(mode, masked=False)(features, keypoints)
    valid = keypoints.valid[..., None]
    expected = loop(features, keypoints, mode).where(valid, features[:, None, :, 0, 0])
    torch.testing.assert_close(actual, expected)


def test_against_grid_sample_with_gradients() -> None:
    keypoints = random_keypoints((12, 20), (8, 8), slots=8)
    positions = keypoints.positions.clone().requires_grad_()
    features = torch.rand(2, 5, 6, 10, dtype=torch.float64, requires_grad=True)
    grid = (2 * positions + 1) / torch.tensor([20, 12]) - 1
    expected = F.grid_sample(features, grid[:, :, None], padding_mode="border", align_corners=False)[..., 0].mT
    actual = sample_keypoints(features, Keypoints(positions, keypoints.valid, (12, 20)))
    torch.testing.assert_close(actual, expected)
    inner = (positions > 0.6).all(-1) & (positions < torch.tensor([18.4, 10.4])).all(-1)  # the border has a kink
    weight = torch.rand_like(actual) * inner[..., None]
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), (features, positions)),
        torch.autograd.grad((expected * weight).sum(), (features, positions)),
    )


def test_channels_last_and_low_precision_keep_their_type() -> None:
    keypoints = random_keypoints((12, 20), (6, 2), dtype=torch.float32)
    features = torch.rand(2, 5, 6, 10)
    expected = sample_keypoints(features, keypoints)
    last = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(sample_keypoints(last, keypoints), expected)
    low = sample_keypoints(features.bfloat16(), keypoints)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=2e-2, rtol=0)


def test_errors() -> None:
    with pytest.raises(ValueError, match="mode='cubic'"):
        KeypointSampler("cubic")
    with pytest.raises(ValueError, match="mode='cubic'"):
        sample_keypoints(torch.rand(1, 1, 4, 6), random_keypoints((4, 6), (1,)), mode="cubic")


def test_shape_and_repr() -> None:
    assert sample_keypoints(torch.rand(2, 7, 4, 6), random_keypoints((8, 12), (3, 0))).shape == (2, 5, 7)
    assert repr(KeypointSampler()) == "KeypointSampler('bilinear')"
    assert repr(KeypointSampler("nearest", masked=False)) == "KeypointSampler('nearest', masked=False)"
