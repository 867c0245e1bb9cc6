"""The phantoms are reproducible, differ, and are hearts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.protocol.volumes.phantom import LABELS, phantom
from examples.protocol.volumes.volume import Volume

SUBJECTS = 6
RV, MYO, LV = 1, 2, 3


@pytest.fixture(scope="module")
def volumes() -> list[Volume]:
    return [phantom(subject) for subject in range(SUBJECTS)]


def neighbours(mask: Tensor) -> Tensor:
    """The pixels (Z, H, W) that have a 4-neighbour in the mask."""
    result = torch.zeros_like(mask)
    for axis in (1, 2):
        n = mask.shape[axis]
        result.narrow(axis, 1, n - 1).logical_or_(mask.narrow(axis, 0, n - 1))
        result.narrow(axis, 0, n - 1).logical_or_(mask.narrow(axis, 1, n - 1))
    return result


def connected(mask: Tensor) -> bool:
    """Whether a mask (H, W) is one piece, by flooding it from one of its pixels."""
    reached = torch.zeros_like(mask)
    reached.view(-1)[int(mask.flatten().int().argmax())] = True
    for _ in range(mask.numel()):
        grown = (reached | neighbours(reached[None])[0]) & mask
        if grown.equal(reached):
            break
        reached = grown
    return reached.equal(mask)


def test_shapes_and_values(volumes: list[Volume]) -> None:
    for volume in volumes:
        assert volume.image.shape == volume.label.shape == (10, 128, 112)
        assert volume.image.dtype == torch.float32
        assert volume.label.dtype == torch.int64
        assert volume.image.isfinite().all()
        assert volume.image.min() >= 0
        assert volume.image.std(dim=(1, 2)).min() > 5  # grey levels
        assert volume.image.equal(volume.image.round())
        assert volume.label.unique().tolist() == list(range(len(LABELS)))


def test_other_sizes_show_the_same_kind_of_heart() -> None:
    volume = phantom(0, size=(64, 80), slices=4)
    assert volume.image.shape == volume.label.shape == (4, 64, 80)
    assert volume.label.unique().tolist() == [0, RV, MYO, LV]


def test_a_number_determines_a_subject(volumes: list[Volume]) -> None:
    torch.manual_seed(1)
    again = phantom(2)
    assert again.image.equal(volumes[2].image)
    assert again.label.equal(volumes[2].label)
    assert again.subject == volumes[2].subject == "phantom-002"


def test_subjects_differ_in_anatomy_position_and_intensity(volumes: list[Volume]) -> None:
    assert len({volume.subject for volume in volumes}) == SUBJECTS
    sizes = torch.stack([volume.label.flatten().bincount() for volume in volumes]).double()
    assert (sizes.std(dim=0) / sizes.mean(dim=0))[1:].min() > 0.1
    centres = torch.stack([(volume.label == LV).nonzero().double().mean(dim=0) for volume in volumes])
    assert centres.std(dim=0)[1:].min() > 3  # pixels
    bloods = torch.stack([volume.image[volume.label == LV].mean() for volume in volumes])
    muscles = torch.stack([volume.image[volume.label == MYO].mean() for volume in volumes])
    assert bloods.max() > 1.5 * bloods.min()
    assert (muscles / bloods).max() > 1.3 * (muscles / bloods).min()
    for volume in volumes[1:]:
        same = (volume.label == LV) & (volumes[0].label == LV)
        assert 2 * same.sum() < 0.9 * ((volume.label == LV).sum() + (volumes[0].label == LV).sum())


def test_the_left_ventricle_is_enclosed_by_myocardium(volumes: list[Volume]) -> None:
    for volume in volumes:
        cavity, outside = volume.label == LV, volume.label <= RV
        assert not (neighbours(cavity) & outside).any()
        assert all(connected(cavity[z]) and connected(cavity[z] | (volume.label[z] == MYO)) for z in range(10))


def test_blood_is_brighter_than_muscle(volumes: list[Volume]) -> None:
    for volume in volumes:
        muscle = volume.image[volume.label == MYO].mean()
        assert volume.image[volume.label == LV].mean() > 1.3 * muscle
        assert volume.image[volume.label == RV].mean() > 1.2 * muscle


def test_the_ventricles_shrink_towards_the_apex(volumes: list[Volume]) -> None:
    for volume in volumes:
        area = torch.stack([(volume.label == label).sum(dim=(1, 2)) for label in range(len(LABELS))]).double()
        assert (area[RV, :5] > 50).all()
        assert area[RV, -1] < 0.2 * area[RV, 0]
        assert (area[LV] > 0).all()
        assert area[LV, -1] < 0.5 * area[LV, 0]
        assert (area[MYO] > area[MYO, 0] / 5).all()


def test_the_right_ventricle_lies_on_the_septum(volumes: list[Volume]) -> None:
    for volume in volumes:
        assert (neighbours(volume.label == MYO) & (volume.label == RV))[:5].any(dim=(1, 2)).all()
        column = torch.arange(volume.label.shape[2])
        right, left = ((volume.label[0] == label).sum(dim=0) for label in (RV, LV))
        assert (column * right).sum() / right.sum() < (column * left).sum() / left.sum()  # the viewer's left


def test_the_contact_sheet_is_a_picture(tmp_path: Path, volumes: list[Volume]) -> None:
    image = pytest.importorskip("matplotlib.image")
    sheets = pytest.importorskip("examples.protocol.drawing.sheets")
    sheets.plot(volumes[:2], tmp_path / "new" / "phantom.png", columns=3)
    picture = image.imread(tmp_path / "new" / "phantom.png")
    assert picture.shape[:2] == (480, 600)
    assert picture[..., :3].std() > 0.1
