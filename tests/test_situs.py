"""The volumes of the demo: two like organs, told apart by a third that is far from both."""

import pytest
import torch
from phantom import Volume
from scipy import ndimage
from situs import situs

SUBJECTS = 12


@pytest.fixture(scope="module")
def volumes() -> list[Volume]:
    return [situs(subject, size=(128, 144)) for subject in range(SUBJECTS)]


def third_organ(volume: Volume, z: int) -> tuple[float, float]:
    """The (x, y) of the largest bright piece without a label."""
    image = ndimage.gaussian_filter(volume.image[z].numpy(), 1)
    pieces, _ = ndimage.label((image > 0.9) & (volume.label[z] == 0).numpy() & ~near_labels(volume, z))
    sizes = ndimage.sum_labels(pieces > 0, pieces, range(1, pieces.max() + 1))
    y, x = ndimage.center_of_mass(pieces == 1 + sizes.argmax())
    return x, y


def near_labels(volume: Volume, z: int):
    return ndimage.binary_dilation((volume.label[z] > 0).numpy(), iterations=4)


def test_the_label_is_the_side(volumes: list[Volume]) -> None:
    for volume in volumes:
        z = len(volume.image) // 2
        x, y = third_organ(volume, z)
        for label in (1, 2):
            ys, xs = (volume.label[z] == label).nonzero(as_tuple=True)
            assert len(ys) > 20
            same_side = (xs.float().mean() > 71.5) == (x > 71.5)
            assert same_side == (label == 1)
            assert min((ys - y).abs().min(), 1000) > 30  # farther than the demo's UNet sees from within an organ


def test_organs_look_alike(volumes: list[Volume]) -> None:
    brightness = torch.tensor([[v.image[v.label == label].mean() for label in (1, 2)] for v in volumes])
    assert (brightness[:, 0] - brightness[:, 1]).abs().max() < 0.05
    sizes = torch.tensor([[(v.label == label).sum() for label in (1, 2)] for v in volumes])
    assert (sizes[:, 0] > sizes[:, 1]).float().mean() not in (0, 1)


def test_a_subject_is_its_number(volumes: list[Volume]) -> None:
    again = situs(5, size=(128, 144))
    assert torch.equal(again.image, volumes[5].image)
    assert torch.equal(again.label, volumes[5].label)
    assert not torch.equal(volumes[4].image, volumes[6].image)
    assert volumes[0].image.shape == (6, 128, 144)
