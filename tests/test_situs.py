"""The volumes of the demo: two like organs, told apart by the side of a third, which is far from both."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from examples.protocol.volumes.situs import situs
from examples.protocol.volumes.volume import Volume

SUBJECTS = 12


@pytest.fixture(scope="module")
def volumes() -> list[Volume]:
    return [situs(subject) for subject in range(SUBJECTS)]


def third_organ(volume: Volume, z: int) -> np.ndarray:
    """Which pixels belong to the largest bright piece away from the labels."""
    image = ndimage.gaussian_filter(volume.image[z].numpy(), 1)
    away = ~ndimage.binary_dilation((volume.label[z] > 0).numpy(), iterations=4)
    pieces, _ = ndimage.label((image > 0.9) & away)
    sizes = ndimage.sum_labels(pieces > 0, pieces, range(1, pieces.max() + 1))
    return pieces == 1 + sizes.argmax()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(ndimage.distance_transform_edt(~a)[b].min())


def test_the_label_is_the_side(volumes: list[Volume]) -> None:
    for volume in volumes:
        z = len(volume.image) // 2
        third = third_organ(volume, z)
        x = third.nonzero()[1].mean()
        left, right = ((volume.label[z] == label).numpy() for label in (1, 2))
        assert left.nonzero()[1].mean() < x - 4
        assert right.nonzero()[1].mean() > x + 4
        # Farther than the demo's UNet sees, 22 pixels.
        assert min(distance(third, left), distance(third, right), distance(left, right)) > 24


def test_neither_place_nor_look_tells_the_label(volumes: list[Volume]) -> None:
    brightness = torch.tensor([[v.image[v.label == label].mean() for label in (1, 2)] for v in volumes])
    assert (brightness[:, 0] - brightness[:, 1]).abs().max() < 0.05
    centres = [[ndimage.center_of_mass((v.label[3] == label).numpy()) for label in (1, 2)] for v in volumes]
    places = torch.tensor(centres)  # (subject, label, row or column)
    assert (places[:, 0, 0] < places[:, 1, 0]).float().mean() == 0.5  # above in half of the subjects
    assert places[:, 0, 1].max() > places[:, 1, 1].min() + 10  # left organs lie right of others' right ones


def test_a_subject_is_its_number(volumes: list[Volume]) -> None:
    again = situs(5)
    assert torch.equal(again.image, volumes[5].image)
    assert torch.equal(again.label, volumes[5].label)
    assert not torch.equal(volumes[4].image, volumes[6].image)
    assert volumes[0].image.shape == (6, 144, 80)
