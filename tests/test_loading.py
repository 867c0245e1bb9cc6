"""Keypoints in data loaders and checkpoints."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import random_keypoints
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kaf_layer import Keypoints

BATCH = random_keypoints((24, 32), (5, 0, 3, 2), dtype=torch.float32, garbage=7.0)


def sample(index: int) -> dict[str, Any]:
    """With as many slots as there are keypoints, so that samples differ."""
    keypoints = BATCH[index]
    count = int(keypoints.valid.sum())
    return {
        "image": torch.full((1, 24, 32), float(index)),
        "keypoints": Keypoints(keypoints.positions[keypoints.valid], torch.ones(count).bool(), (24, 32)),
        "name": str(index),
    }


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return sample(index)


def check(batch: dict[str, Any], indices: list[int]) -> None:
    assert isinstance(batch["keypoints"], Keypoints)
    for row, index in enumerate(indices):
        keypoints = batch["keypoints"][row]
        assert keypoints.positions[keypoints.valid].equal(BATCH[index].positions[BATCH[index].valid])
        assert batch["image"][row].eq(index).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_stacks_them(workers: int) -> None:
    loader = DataLoader(Samples(), batch_size=2, num_workers=workers)
    for batch, indices in zip(loader, ([0, 1], [2, 3]), strict=True):
        check(batch, indices)


def test_in_tuples_and_by_themselves() -> None:
    images, keypoints = default_collate([(s["image"], s["keypoints"]) for s in map(sample, range(4))])
    check({"image": images, "keypoints": keypoints}, [0, 1, 2, 3])
    assert default_collate([BATCH[0], BATCH[1]]).positions.shape == (2, *BATCH.positions.shape[1:])
    with pytest.raises(ValueError, match="stack takes"):
        default_collate([BATCH, BATCH])


def test_monai_collates_them_with_metadata() -> None:
    data = pytest.importorskip("monai.data")
    samples = [{**sample(i), "image": data.MetaTensor(sample(i)["image"])} for i in (2, 3)]
    batch = data.list_data_collate(samples)
    check(batch, [2, 3])
    assert isinstance(batch["image"], data.MetaTensor)


@pytest.mark.parametrize("detach", [True, False])
def test_monai_takes_a_batch_apart_and_puts_it_together(detach: bool) -> None:
    data = pytest.importorskip("monai.data")
    positions = BATCH.positions.clone().requires_grad_()
    keypoints = replace(BATCH, positions=positions, scores=BATCH.positions[..., 0], padded=False)
    batch = {"image": torch.rand(4, 1, 24, 32), "keypoints": keypoints, "nested": [{"again": keypoints}], "number": 1}
    samples = data.decollate_batch(batch, detach=detach)
    assert len(samples) == 4
    for index, taken in enumerate(samples):
        for one in (taken["keypoints"], taken["nested"][0]["again"]):
            assert isinstance(one, Keypoints)
            assert one.positions.requires_grad is not detach
            assert one.positions.equal(positions[index])
            assert one.valid.equal(keypoints.valid[index])
            assert one.scores is not None
            assert one.scores.isnan().equal(keypoints.positions[index, :, 0].isnan())
            assert (one.image_size, one.padded) == ((24, 32), False)
    back = data.list_data_collate(samples)["keypoints"]
    assert back.positions.equal(positions)
    assert back.valid.equal(keypoints.valid)
    assert [sample.valid.sum() for sample in data.decollate_batch(back)] == [5, 0, 3, 2]


@pytest.mark.parametrize("saved", [BATCH, BATCH[1]], ids=["batch", "sample"])
def test_loads_with_weights_only(saved: Keypoints) -> None:
    file = io.BytesIO()
    torch.save({"keypoints": saved}, file)
    file.seek(0)
    loaded: Keypoints = torch.load(file, weights_only=True)["keypoints"]
    tensors: list[Tensor] = [loaded.positions, loaded.valid]
    assert type(loaded) is type(saved)
    assert tensors[0].equal(saved.positions)
    assert tensors[1].equal(saved.valid)
    assert loaded.image_size == (24, 32)
