"""Keypoints: shapes, maps of other sizes, batches, and the pytree."""

import copy
import io
import math
import pickle
import re
from collections.abc import Iterable

import pytest
import torch
from common import NAN, random_keypoints
from torch._subclasses.fake_tensor import FakeTensorMode
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


def test_to_keeps_integers_and_keep_ends_the_promise() -> None:
    descriptors = torch.randint(0, 255, (1, 2, 4), dtype=torch.uint8)
    keypoints = Keypoints(torch.rand(1, 2, 2), ones(1, 2), (6, 8), descriptors=descriptors, padded=False)
    assert torch.equal(keypoints.to(torch.float64).descriptors, descriptors)
    kept = keypoints.keep(torch.tensor([[True, False]]))
    assert kept.valid.tolist() == [[True, False]]
    assert kept.padded


def test_printed_in_one_line() -> None:
    values = {name: torch.rand(2, 128) for name in ("scores", "scales", "angles")}
    valid = torch.arange(128) < torch.tensor([[17], [25]])
    keypoints = Keypoints(torch.rand(2, 128, 2) * 90, valid, (96, 128), descriptors=torch.rand(2, 128, 4), **values)
    text = "Keypoints(2 samples x 128 slots, 17 to 25 valid, image 96x128, scores, scales, angles, descriptors)"
    assert repr(keypoints) == str(keypoints) == text
    assert repr(Keypoints(keypoints.positions, valid, (96, 128))[0]) == "Keypoints(128 slots, 17 valid, image 96x128)"
    assert repr(keypoints[:0]).startswith("Keypoints(0 samples x 128 slots, 0 valid, image 96x128")
    assert repr(Keypoints(torch.zeros(1, 0, 3), ones(1, 0), (4, 5, 6))) == (
        "Keypoints(1 sample x 0 slots, 0 valid, image 4x5x6)"
    )
    outside = Keypoints(torch.tensor([[[3.0, 90.0], [NAN, 1.0], [500.0, 1.0]]]), ones(1, 3), (96, 128))
    outside.valid[0, 2] = False
    assert repr(outside) == "Keypoints(1 sample x 3 slots, 2 valid, 1 outside of the image, image 96x128)"


def test_printed_without_values_to_look_at() -> None:
    """Fake and meta tensors, tensors under a transformation, what pytrees put in place of tensors, compiled code."""
    keypoints = random_keypoints((8, 12), (3, 0))
    text = "Keypoints(2 samples x 5 slots, image 8x12)"
    assert repr(keypoints.to("meta")) == text
    with FakeTensorMode():
        assert repr(Keypoints(torch.rand(2, 5, 2), torch.rand(2, 5) > 0.5, (8, 12))) == text
    seen = []
    torch.func.vmap(lambda p, valid: seen.append(repr(Keypoints(p, valid, (8, 12)))) or p)(
        keypoints.positions, keypoints.valid
    )
    assert seen == ["Keypoints(5 slots, image 8x12)"]
    placeholders = pytree.tree_map(lambda _: "*", keypoints)
    assert repr(placeholders).startswith("Keypoints(positions='*', valid='*'")
    exported = torch.export.export(_Printer(), (keypoints,), strict=False)
    assert torch.equal(exported.module()(keypoints), keypoints.valid)


class _Printer(torch.nn.Module):
    def forward(self, keypoints: Keypoints) -> torch.Tensor:
        assert repr(keypoints)
        return keypoints.valid.clone()


def test_check_finds_swapped_axes_other_units_and_nan() -> None:
    keypoints = Keypoints(torch.tensor([[[3.0, 11.0], [1.0, 2.0]]]), ones(1, 2), (8, 12))
    with pytest.raises(ValueError, match=r"positions must be \(x, y\).*got 1 valid keypoint outside of 8x12.*swapped"):
        keypoints.check()
    with pytest.raises(ValueError, match=r"2 valid keypoints outside of 8x12.*another unit"):
        Keypoints(keypoints.positions * 30, keypoints.valid, (8, 12)).check()
    with pytest.raises(ValueError, match="1 valid keypoint outside"):
        Keypoints(torch.tensor([[1.0, NAN]]), ones(1), (8, 12)).check()
    volume = Keypoints(torch.tensor([[1.0, 2.0, 6.0]]), ones(1), (4, 8, 12))
    with pytest.raises(
        ValueError, match=r"\(x, y, z\).*outside of 4x8x12 \(depth x height x width\): are x and z swapped"
    ):
        volume.check()
    inside = keypoints.keep(torch.tensor([[False, True]]))
    assert inside.check() is inside
    with pytest.warns(UserWarning, match=r"samples \[1\] have no keypoints: KAF layers do nothing for them"):
        random_keypoints((8, 12), (3, 0)).check()
    with pytest.warns(UserWarning, match="there are no keypoints"):
        keypoints[0].keep(torch.zeros(2, dtype=torch.bool)).check()


def test_a_batch_is_iterable_and_a_sample_is_not() -> None:
    keypoints = random_keypoints((24, 32), (5, 0, 3))
    samples = list(keypoints)
    assert [sample.positions.data_ptr() for sample in samples] == [p.data_ptr() for p in keypoints.positions]
    leaves, spec = pytree.tree_flatten(samples[0])
    kept = [samples[0].to(torch.float64), samples[0].keep(samples[0].valid), samples[0].resize((6, 8)), samples[0][:2]]
    kept += [copy.deepcopy(samples[0]), pickle.loads(pickle.dumps(samples[0])), pytree.tree_unflatten(leaves, spec)]
    for sample in [*samples, *kept, keypoints[:, :2][0]]:
        assert not isinstance(sample, Iterable)
        with pytest.raises(TypeError, match="not iterable"):
            iter(sample)
    assert isinstance(keypoints[1:], Iterable)
    assert isinstance(Keypoints.stack(samples), Iterable)
    assert [len(sample) for sample in keypoints] == [7, 7, 7]
