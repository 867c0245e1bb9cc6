"""A blob drawn at each keypoint is still under it after every augmentation."""

import dataclasses

import kornia.augmentation as K
import pytest
import torch
from common import random_keypoints
from torch import Tensor

from kaf_layer import Keypoints
from kaf_layer.augmentation import KeypointAugmentation, invert_deformation
from kaf_layer.matching import Matches

SIZE = (96, 160)
ELASTIC = {
    "smooth": {"p": 1.0},
    "strong": {"kernel_size": (63, 63), "sigma": (8.0, 8.0), "alpha": (0.6, 0.6), "p": 1.0},
    "corners": {"kernel_size": (63, 63), "sigma": (8.0, 8.0), "alpha": (0.25, 0.25), "align_corners": True, "p": 1.0},
}
TRANSFORMS = {
    "horizontal flip": [K.RandomHorizontalFlip(p=1.0)],
    "vertical flip": [K.RandomVerticalFlip(p=1.0)],
    "rotation": [K.RandomRotation(40.0, p=1.0)],
    "rotation by 90 degrees": [K.RandomRotation90((1, 3), p=1.0)],
    "scaling": [K.RandomAffine(0.0, scale=(0.7, 1.4), p=1.0)],
    "translation": [K.RandomTranslate((0.2, 0.2), (0.2, 0.2), p=1.0)],
    "affine": [K.RandomAffine(30.0, (0.2, 0.2), (0.8, 1.2), 10.0, p=1.0, align_corners=True)],
    "perspective": [K.RandomPerspective(0.3, p=1.0)],
    "crop": [K.RandomCrop((64, 100))],
    "centre crop": [K.CenterCrop((64, 100))],
    "resized crop": [K.RandomResizedCrop((80, 120), scale=(0.6, 1.0))],
    "resampled crop": [K.RandomResizedCrop((80, 120), scale=(0.6, 1.0), cropping_mode="resample")],
    **{f"{name} elastic": [K.RandomElasticTransform(**options)] for name, options in ELASTIC.items()},
    "all": [
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(20.0, (0.1, 0.1), (0.9, 1.1), p=0.8),
        K.RandomElasticTransform(**ELASTIC["corners"]),
        K.RandomContrast((0.8, 1.2), p=1.0),
        K.RandomResizedCrop((80, 120), scale=(0.5, 1.0)),
    ],
}


def scene(*, samples: int = 24, seed: int = 0) -> tuple[Tensor, Keypoints]:
    """One blob per image, and its keypoint in slot 1 of 3; slot 0 is padded, slot 2 in a corner."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(SIZE[::-1], dtype=torch.float64)
    positions = torch.full((samples, 3, 2), torch.nan, dtype=torch.float64)
    positions[:, 1] = size * (0.15 + 0.7 * torch.rand(samples, 2, generator=generator, dtype=torch.float64))
    positions[:, 2] = size - 1
    valid = torch.tensor([False, True, True]).repeat(samples, 1)
    return draw(positions[:, 1], SIZE), Keypoints(positions, valid, SIZE)


def grid(size: tuple[int, int]) -> Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in size), indexing="ij")[::-1])


def draw(centres: Tensor, size: tuple[int, int]) -> Tensor:
    return (-(grid(size) - centres[..., None, None]).square().sum(1, keepdim=True) / (2 * 1.5**2)).exp()


def centroid(image: Tensor) -> Tensor:
    return (image * grid(image.shape[-2:])).sum((1, 2)) / image.sum()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_blobs_stay_under_their_keypoints(name: str) -> None:
    torch.manual_seed(0)
    blobs, keypoints = scene()
    labels = (blobs > 1e-6).long()  # a disc of 8 pixels
    images = torch.cat([blobs, labels], dim=1)
    augmented = KeypointAugmentation(*TRANSFORMS[name])(images, keypoints, labels)
    height, width = augmented.keypoints.image_size
    assert augmented.images.shape[2:] == augmented.labels.shape[2:] == (height, width)
    assert augmented.labels.dtype == torch.long
    assert not augmented.keypoints.valid[:, 0].any()
    seen = 0
    for i, (x, y) in enumerate(augmented.keypoints.positions[:, 1].tolist()):
        inside = -0.5 <= x < width - 0.5 and -0.5 <= y < height - 0.5
        assert augmented.keypoints.valid[i, 1] == inside
        if 12 < x < width - 13 and 12 < y < height - 13:  # the whole blob is in the frame
            blob, disc = augmented.images[i]
            off = centroid(blob) - torch.tensor([x, y], dtype=torch.float64)
            label_off = centroid(augmented.labels[i, 0]) - centroid(disc)
            assert max(off.abs().max(), label_off.abs().max()) < 0.5, (name, i, off, label_off)
            seen += 1
        elif not (-15 < x < width + 15 and -15 < y < height + 15) or (x != x):
            assert augmented.images[i, 0].max() < 0.1
    assert seen >= 8


@pytest.mark.parametrize("name", ELASTIC)
def test_inverted_to_a_tenth_of_a_pixel(name: str) -> None:
    """Warping the map of positions itself says where each position went."""
    torch.manual_seed(1)
    elastic = K.RandomElasticTransform(**ELASTIC[name])
    image, keypoints = grid(SIZE).expand(2, -1, -1, -1), random_keypoints(SIZE, (40, 0), seed=1)
    keypoints = dataclasses.replace(keypoints, scales=torch.ones(2, 42), angles=torch.ones(2, 42))
    warped, moved, _ = KeypointAugmentation(elastic)(image, keypoints)
    assert moved.scales[moved.valid].isfinite().all()
    assert moved.angles[moved.valid].isfinite().all()
    where, before = moved.positions[moved.valid], keypoints.positions[moved.valid]
    inner = ((where > 1) & (where < torch.tensor(SIZE[::-1]) - 2)).all(1)
    normalised = 2 * where / (torch.tensor(SIZE[::-1]) - 1) - 1
    found = torch.nn.functional.grid_sample(warped[:1], normalised[None, None], align_corners=True)[0, :, 0].T
    assert (found - before)[inner].abs().max() < 0.1
    assert inner.sum() > 20


def test_against_a_known_deformation() -> None:
    """The warp x + 3 sin(y / 9) has a closed-form inverse; and what has no place is NaN."""
    x, y = grid(SIZE)
    sources = torch.stack([x + 3 * (y / 9).sin(), y])[None]
    positions = torch.tensor([[[40.0, 30.0], [90.5, 70.25], [500.0, 3.0]]], dtype=torch.float64)
    result = invert_deformation(sources, positions)
    expected = positions[..., 0] - 3 * (positions[..., 1] / 9).sin()
    torch.testing.assert_close(result[0, :2, 0], expected[0, :2], rtol=0, atol=0.05)  # bilinear between the rows
    assert result[0, 2].isnan().all()


@pytest.mark.parametrize("transform", [K.RandomHorizontalFlip(p=1.0), K.RandomAffine(40.0, scale=(0.7, 1.4), p=1.0)])
def test_scales_and_angles(transform: torch.nn.Module) -> None:
    """Slot 1 lies 3 pixels from slot 0, in the direction of its angle."""
    angle = torch.tensor(0.4)
    positions = torch.tensor([[80.0, 48.0], [80.0, 48.0]])
    positions[1] += 3 * torch.stack([angle.cos(), angle.sin()])
    given = {name: torch.full((1, 2), value) for name, value in (("scales", 3.0), ("angles", 0.4), ("scores", 1.0))}
    keypoints = Keypoints(positions[None], torch.ones(1, 2, dtype=torch.bool), SIZE, **given)
    moved = KeypointAugmentation(transform)(torch.rand(1, 1, *SIZE), keypoints).keypoints
    x, y = (moved.positions[0, 1] - moved.positions[0, 0]).unbind()
    torch.testing.assert_close(moved.angles[0, 0], torch.atan2(y, x), rtol=0, atol=1e-4)
    torch.testing.assert_close(moved.scales[0, 0], torch.hypot(x, y), rtol=1e-4, atol=0)
    assert moved.scores is keypoints.scores


def test_matches_follow() -> None:
    a = random_keypoints(SIZE, (6,), slots=6, dtype=torch.float32)
    a = dataclasses.replace(
        a, positions=torch.tensor([[[10.0, 9.0], [50.0, 9.0], [90.0, 9.0], [130.0, 9.0], [150.0, 9.0], [80.0, 90.0]]])
    )
    matches = Matches(torch.tensor([[5, 4, 3, 2, 1, -1]]), torch.tensor([[-1, 4, 3, 2, 1, 0]]))
    cropped = KeypointAugmentation(K.CenterCrop((96, 80)))(torch.rand(1, 1, *SIZE), a).keypoints
    assert cropped.valid.tolist() == [[False, True, True, False, False, True]]
    kept = matches.among(cropped, a)
    assert kept.indices.tolist() == [[-1, 4, 3, -1, -1, -1]]
    assert kept.inverse.tolist() == [[-1, -1, -1, 2, 1, -1]]


@pytest.mark.parametrize("shape", [(2, 96, 160), (2, 1, 96, 160)])
def test_labels_of_any_shape_and_type(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 200, shape, dtype=torch.uint8)
    keypoints = random_keypoints(SIZE, (3, 0), dtype=torch.float32)
    augment = KeypointAugmentation(K.RandomVerticalFlip(p=1.0))
    assert augment(torch.rand(2, 3, *SIZE), keypoints, labels).labels.equal(labels.flip(-2))


@pytest.mark.parametrize("name", ["horizontal flip", "affine", "centre crop", "smooth elastic", "all"])
def test_an_empty_batch(name: str) -> None:
    keypoints = random_keypoints(SIZE, (2,))[:0]
    augment = KeypointAugmentation(*TRANSFORMS[name])
    whole = augment(torch.rand(2, 1, *SIZE), random_keypoints(SIZE, (2, 2)), torch.zeros(2, *SIZE))
    images, moved, labels = augment(torch.rand(0, 1, *SIZE), keypoints, torch.zeros(0, *SIZE))
    assert images.shape == (0, *whole.images.shape[1:])
    assert labels.shape == (0, *whole.labels.shape[1:])
    assert moved.valid.shape == (0, keypoints.valid.shape[1])
    assert moved.image_size == whole.keypoints.image_size


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (2, 2), (1, 1)])
def test_labels_of_one_row(size: tuple[int, int]) -> None:
    labels = torch.arange(1, 1 + size[0] * size[1]).reshape(1, *size)
    augment = KeypointAugmentation(K.RandomHorizontalFlip(p=1.0))
    images, _, flipped = augment(labels[None].double(), random_keypoints(size, (1,)), labels)
    assert flipped.equal(labels.flip(2))
    assert images[0].equal(flipped.double())


def test_errors() -> None:
    keypoints = random_keypoints(SIZE, (3, 0), dtype=torch.float32)
    with pytest.raises(ValueError, match="transforms must be"):
        KeypointAugmentation(K.RandomFisheye(torch.zeros(2), torch.zeros(2), torch.zeros(2)))
    augment = KeypointAugmentation(K.RandomVerticalFlip())
    with pytest.raises(ValueError, match="detected on"):
        augment(torch.rand(2, 1, *SIZE[::-1]), keypoints)
    with pytest.raises(ValueError, match="labels must be"):
        augment(torch.rand(2, 1, *SIZE), keypoints, torch.zeros(2, 3, *SIZE))
