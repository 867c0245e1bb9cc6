"""Keypoints: shapes, maps of other sizes, batches, and the pytree."""

import io
import math
import pickle
import re

import pytest
import torch
from common import NAN, random_keypoints
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from kaf_layer import Keypoints, KeypointSampler


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(("image_size", "feature_size"), [((12, 20), (6, 5)), ((9, 7), (5, 4)), ((4, 6, 8), (2, 6, 3))])
def test_cells_and_positions_against_the_definition(image_size: tuple[int, ...], feature_size: tuple[int, ...]) -> None:
    keypoints = random_keypoints(image_size, (9, 0, 4), seed=3)
    cells, positions = keypoints.cells(feature_size), keypoints.positions_in(feature_size)
    for sample, slot in keypoints.valid.nonzero().tolist():
        index = 0
        for axis, (size, image) in enumerate(zip(feature_size, image_size, strict=True)):
            coordinate = len(image_size) - 1 - axis
            p = keypoints.positions[sample, slot, coordinate].item()
            index = index * size + min(max(math.floor((p + 0.5) * size / image), 0), size - 1)
            assert positions[sample, slot, coordinate].item() == pytest.approx((p + 0.5) * size / image - 0.5)
        assert cells[sample, slot].item() == index
    assert positions.isfinite().all()
    assert cells.min() >= 0
    assert cells.max() < math.prod(feature_size)


def test_integer_pixels_halve_as_integers_do() -> None:
    x = torch.arange(96.0)
    keypoints = Keypoints(torch.stack([x, x / 2], dim=-1)[None], ones(1, 96), (48, 96))
    for level in (1, 2, 4, 8):
        columns = keypoints.cells((48 // level, 96 // level)) % (96 // level)
        assert torch.equal(columns[0], torch.arange(96) // level)


def test_positions_outside_are_in_the_nearest_border_cell() -> None:
    keypoints = Keypoints(torch.tensor([[[-7.0, 3.0], [99.0, -1.0], [5.0, 1e9]]]), ones(1, 3), (8, 12))
    assert keypoints.cells((8, 12)).tolist() == [[3 * 12, 11, 7 * 12 + 5]]


@pytest.mark.parametrize("snap", [False, True])
def test_resize(snap: bool) -> None:
    keypoints = random_keypoints((12, 20), (5, 0))
    resized = keypoints.resize((6, 5), snap=snap)
    assert resized.image_size == (6, 5)
    assert torch.equal(resized.cells((6, 5)), keypoints.cells((6, 5)))
    if snap:
        x, y = resized.positions.unbind(-1)
        assert torch.equal(y * 5 + x, keypoints.cells((6, 5)).double())
    else:
        valid = keypoints.valid
        torch.testing.assert_close(resized.positions_in((12, 20))[valid], keypoints.positions[valid])


def test_half_precision_positions_are_computed_in_float32() -> None:
    keypoints = Keypoints(torch.tensor([[[100.0, 7.0]]]), ones(1, 1), (128, 256))
    assert keypoints.to(torch.bfloat16).positions_in((128, 256)).dtype == torch.float32


def test_stack_pads_and_index_takes_apart() -> None:
    samples = [
        Keypoints(torch.rand(n, 2), ones(n), (6, 8), scores=torch.rand(n), descriptors=torch.rand(n, 5))
        for n in (3, 0, 5)
    ]
    batch = Keypoints.stack(samples)
    assert batch.positions.shape == (3, 5, 2)
    assert batch.valid.sum(1).tolist() == [3, 0, 5]
    assert len(batch) == 3
    for i, sample in enumerate(samples):
        for name in ("positions", "scores", "descriptors"):
            assert torch.equal(getattr(batch[i], name)[batch[i].valid], getattr(sample, name))
    assert batch.scales is None
    assert Keypoints.stack([samples[0], Keypoints(torch.rand(1, 2), ones(1), (6, 8))]).scores is None


def test_padded_is_known_statically() -> None:
    full = Keypoints(torch.rand(3, 2), ones(3), (6, 8), padded=False)
    assert not Keypoints.stack([full, full]).padded
    assert Keypoints.stack([full, full[:2]]).padded
    assert not full.resize((3, 4)).padded


def test_to_detach_and_pickle() -> None:
    keypoints = Keypoints(torch.rand(2, 3, 2, requires_grad=True), ones(2, 3), (6, 8), scores=torch.rand(2, 3))
    moved = keypoints.to(torch.float64)
    assert moved.positions.dtype == moved.scores.dtype == torch.float64
    assert moved.valid.dtype == torch.bool
    assert keypoints.to("meta").valid.device.type == "meta"
    assert not keypoints.detach().positions.requires_grad
    assert torch.equal(pickle.loads(pickle.dumps(keypoints)).positions, keypoints.positions)
    file = io.BytesIO()
    torch.save(keypoints.detach(), file)
    file.seek(0)
    with torch.serialization.safe_globals([Keypoints]):
        assert torch.equal(torch.load(file, weights_only=True).valid, keypoints.valid)


def test_pytree_round_trip() -> None:
    keypoints = random_keypoints((6, 8), (2, 0))
    leaves, tree = pytree.tree_flatten(keypoints)
    again = pytree.tree_unflatten(leaves, tree)
    assert isinstance(again, Keypoints)
    assert any(leaf is keypoints.positions for leaf in leaves)
    assert again.image_size == (6, 8)
    assert torch.equal(again.valid, keypoints.valid)


def test_data_loader() -> None:
    samples = [Keypoints(torch.rand(n, 2), ones(n), (6, 8)) for n in (3, 1, 2)]
    batches = list(DataLoader(samples, batch_size=2, collate_fn=Keypoints.stack))
    assert [tuple(batch.positions.shape) for batch in batches] == [(2, 3, 2), (1, 2, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2, 3, 3), ones(2, 3), (6, 8)), "D coordinates for D axes"),
        ((torch.rand(2), ones(2), (6, 8)), "positions must be (B, N, D)"),
        ((torch.ones(2, 3, 2, dtype=torch.long), ones(2, 3), (6, 8)), "call .float()"),
        ((torch.rand(2, 3, 2), torch.ones(2, 3), (6, 8)), "call .bool()"),
        ((torch.rand(2, 3, 2), ones(3, 2), (6, 8)), "valid must begin with the shape (2, 3)"),
    ],
)
def test_errors(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Keypoints(*arguments)


def test_stack_errors() -> None:
    a, b = (Keypoints(torch.rand(1, 2), ones(1), size) for size in [(6, 8), (8, 6)])
    with pytest.raises(ValueError, match=r"one image size, got \[\(6, 8\), \(8, 6\)\]"):
        Keypoints.stack([a, b])
    with pytest.raises(ValueError, match="without a batch axis"):
        Keypoints.stack([])
    with pytest.raises(ValueError, match=r"without a batch axis.*\(1, 1, 2\)"):
        Keypoints.stack([Keypoints(torch.full((1, 1, 2), NAN), ones(1, 1), (6, 8))])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 6), "2 spatial axes"),
        ((2, 4, 3, 6, 8), "2 spatial axes"),
        ((1, 4, 6, 8), "batch size"),
        ((2, 4, 8, 6), "H and W swapped"),
        ((2, 4, 5, 7), "H and W swapped"),
    ],
)
def test_a_map_of_another_image_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeypointSampler()(torch.rand(shape), Keypoints(torch.rand(2, 3, 2), ones(2, 3), (6, 8)))


@pytest.mark.parametrize("size", [(6, 8), (3, 4), (2, 2), (1, 1), (12, 16), (6, 4)])
def test_a_map_of_the_image_is_taken(size: tuple[int, int]) -> None:
    KeypointSampler()(torch.rand(2, 4, *size), Keypoints(torch.rand(2, 3, 2), ones(2, 3), (6, 8)))


def test_to_keeps_integers_and_where_keeps_the_promise() -> None:
    descriptors = torch.randint(0, 255, (1, 2, 4), dtype=torch.uint8)
    keypoints = Keypoints(torch.rand(1, 2, 2), ones(1, 2), (6, 8), descriptors=descriptors, padded=False)
    assert torch.equal(keypoints.to(torch.float64).descriptors, descriptors)
    kept = keypoints.where(torch.tensor([[True, False]]))
    assert kept.valid.tolist() == [[True, False]]
    assert kept.padded
