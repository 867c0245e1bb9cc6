"""Keypoints in data loaders and checkpoints."""

import io
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


def test_loads_with_weights_only() -> None:
    file = io.BytesIO()
    torch.save({"keypoints": BATCH}, file)
    file.seek(0)
    loaded: Keypoints = torch.load(file, weights_only=True)["keypoints"]
    tensors: list[Tensor] = [loaded.positions, loaded.valid]
    assert tensors[0].equal(BATCH.positions)
    assert tensors[1].equal(BATCH.valid)
    assert loaded.image_size == (24, 32)
