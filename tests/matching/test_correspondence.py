"""Correspondences against a brute-force loop."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from common import fill_padding, random_keypoints
from torch.utils import _pytree as pytree

from kaf_layer import Keypoints, SIFTDetector
from kaf_layer.matching import Matches, match_keypoints

VOLUME = Path(__file__).parents[3] / "shared/data/sunnybrook/SC-HF-I-01/SC-HF-I-01_ED.nii.gz"


def described(counts: tuple[int, ...], *, seed: int, image_size: tuple[int, ...] = (24, 40)) -> Keypoints:
    keypoints = random_keypoints(image_size, counts, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    descriptors = torch.randn(*keypoints.valid.shape, 8, generator=generator, dtype=torch.float64)
    return dataclasses.replace(keypoints, descriptors=fill_padding(descriptors, keypoints))


def best(a: Keypoints, b: Keypoints, i: int, max_distance: float) -> int:
    """The best candidate in b of keypoint i of a, both one sample, or -1."""
    found, smallest = -1, float("inf")
    for j in range(len(b)):
        near = (a.positions[i] - b.positions[j]).abs().sum() <= max_distance
        difference = (a.descriptors[i] - b.descriptors[j]).square().sum().sqrt()
        if a.valid[i] and b.valid[j] and near and difference < smallest:
            found, smallest = j, difference
    return found


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("max_distance", [0.0, 5.0, 15.0, 100.0])
@pytest.mark.parametrize("image_size", [(24, 40), (8, 12, 16)])
def test_brute_force(mutual: bool, max_distance: float, image_size: tuple[int, ...]) -> None:
    a = described((7, 0, 12, 5), seed=0, image_size=image_size)
    b = described((9, 6, 15, 0), seed=1, image_size=image_size)
    matches = match_keypoints(a, b, max_distance=max_distance, mutual=mutual)
    for s in range(4):
        to_b = [best(a[s], b[s], i, max_distance) for i in range(a.valid.shape[1])]
        to_a = [best(b[s], a[s], j, max_distance) for j in range(b.valid.shape[1])]
        if mutual:
            to_b, to_a = (
                [j if j >= 0 and back[j] == i else -1 for i, j in enumerate(there)]
                for there, back in ((to_b, to_a), (to_a, to_b))
            )
        assert matches.indices[s].tolist() == to_b
        assert matches.inverse[s].tolist() == to_a


@pytest.mark.skipif(not VOLUME.exists(), reason=f"needs {VOLUME}")
def test_neighbouring_slices() -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = np.asarray(nibabel.load(VOLUME).dataobj, dtype=np.float32)[64:192, 64:192, 2:5]
    keypoints = SIFTDetector(max_keypoints=32)(torch.from_numpy(volume).permute(2, 1, 0)[:, None])
    a, b = keypoints[:2], keypoints[1:]
    found = []
    for max_distance in (5.0, 10.0, 20.0, 40.0):
        matches = match_keypoints(a, b, max_distance=max_distance, mutual=False)
        for s in range(2):
            assert matches.indices[s].tolist() == [best(a[s], b[s], i, max_distance) for i in range(len(a[s]))]
        found.append((matches.indices >= 0).sum() / a.valid.sum())
    assert found == sorted(found)
    assert found[-1] > 0.5


def test_an_image_matches_itself() -> None:
    keypoints = described((7, 0, 4), seed=0)
    matches = match_keypoints(keypoints, keypoints)
    slots = torch.arange(keypoints.valid.shape[1]).expand_as(keypoints.valid)
    assert matches.indices.equal(slots.where(keypoints.valid, -1))
    assert matches.inverse.equal(matches.indices)


def test_no_slots() -> None:
    a, b = described((2, 1), seed=0), described((0, 0), seed=1)
    b = dataclasses.replace(b, positions=b.positions[:, :0], valid=b.valid[:, :0], descriptors=b.descriptors[:, :0])
    assert (match_keypoints(a, b).indices == -1).all()
    assert match_keypoints(a, b).inverse.shape == (2, 0)


def test_among() -> None:
    a, b = described((7, 3), seed=0), described((9, 6), seed=1)
    matches = match_keypoints(a, b, max_distance=50.0)
    gone_a, gone_b = (dataclasses.replace(kp, valid=kp.valid & (kp.positions[..., 0] > 12)) for kp in (a, b))
    kept = matches.among(gone_a, gone_b)
    for s, i in torch.cartesian_prod(torch.arange(2), torch.arange(a.valid.shape[1])).tolist():
        j = matches.indices[s, i]
        assert kept.indices[s, i] == (j if j >= 0 and gone_a.valid[s, i] and gone_b.valid[s, j] else -1)
    for s, j in torch.cartesian_prod(torch.arange(2), torch.arange(b.valid.shape[1])).tolist():
        i = matches.inverse[s, j]
        assert kept.inverse[s, j] == (i if i >= 0 and gone_b.valid[s, j] and gone_a.valid[s, i] else -1)
    assert 0 < (kept.indices >= 0).sum() < (matches.indices >= 0).sum()
    with pytest.raises(ValueError, match="matches must be of these keypoints"):
        matches.among(b, a)


def test_compiles() -> None:
    a, b = described((7, 0), seed=0), described((9, 6), seed=1)
    compiled = torch.compile(match_keypoints, fullgraph=True, backend="aot_eager")(a, b)
    expected = match_keypoints(a, b)
    assert compiled.indices.equal(expected.indices)
    assert compiled.inverse.equal(expected.inverse)


def test_moves_and_is_a_pytree() -> None:
    expected = match_keypoints(described((7, 0), seed=0), described((9, 6), seed=1))
    assert len(pytree.tree_leaves(expected)) == 2
    for moved in (expected.to("cpu", torch.float32), expected.to(device="cpu", dtype=torch.float32)):
        assert moved.indices.equal(expected.indices)
        assert moved.inverse.equal(expected.inverse)
    for moved in (expected.to("meta"), expected.to(device="meta")):
        assert moved.indices.is_meta
        assert moved.inverse.is_meta


def test_errors() -> None:
    a, b = described((7, 2), seed=0), described((9, 6), seed=1)
    with pytest.raises(ValueError, match=r"descriptors=True.*none in b"):
        match_keypoints(a, dataclasses.replace(b, descriptors=None))
    with pytest.raises(ValueError, match="same number of images of the same size"):
        match_keypoints(a, described((9, 6), seed=1, image_size=(24, 41)))
    with pytest.raises(ValueError, match="same number of images of the same size"):
        match_keypoints(a, b[:1])
    with pytest.raises(ValueError, match="one length"):
        match_keypoints(a, dataclasses.replace(b, descriptors=b.descriptors[..., :4]))
    with pytest.raises(ValueError, match=r"indices must be \(B, N_a\)"):
        Matches(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="must be long"):
        Matches(torch.zeros(2, 3), torch.zeros(2, 3))


def test_descriptors_that_are_nearly_alike() -> None:
    """A distance by a matrix product, which torch prefers from 25 points on, would lose such differences."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    descriptors = 100 + 1e-3 * torch.eye(30)[None]
    a, b = (
        Keypoints(torch.zeros(1, 30, 2), torch.ones(1, 30, dtype=torch.bool), (8, 8), descriptors=values)
        for values in (descriptors[:, order], descriptors)
    )
    assert match_keypoints(a, b).indices[0].equal(order)
