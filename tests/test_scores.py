"""Scores of volumes: surfaces' distances against a loop over voxels, and what is not there."""

from itertools import product
from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from torch import Tensor

scores = pytest.importorskip("examples.protocol.results.scores", reason="the extra train is not here")


def surface(region: Tensor) -> list[tuple[int, ...]]:
    """Voxels with a neighbour, by a face, that is outside of the region."""
    inside = {tuple(voxel) for voxel in region.nonzero().tolist()}
    steps = [step for step in product((-1, 0, 1), repeat=3) if sum(map(abs, step)) == 1]
    return [v for v in inside if any(tuple(np.add(v, step)) not in inside for step in steps)]


def distances(a: Tensor, b: Tensor, spacing: tuple[float, ...]) -> list[float]:
    return [min(float(np.linalg.norm(np.subtract(v, w) * spacing)) for w in surface(b)) for v in surface(a)]


def blobs() -> tuple[Tensor, Tensor]:
    """Two different bodies of two classes, neither at the border."""
    z, y, x = np.indices((6, 12, 14))
    label, predicted = torch.zeros(2, 6, 12, 14, dtype=torch.long)
    label[torch.from_numpy((z - 2) ** 2 + (y - 5) ** 2 / 6 + (x - 6) ** 2 / 9 < 2)] = 1
    predicted[torch.from_numpy((z - 3) ** 2 + (y - 6) ** 2 / 4 + (x - 7) ** 2 / 8 < 1.6)] = 1
    label[2:4, 8:10, 10:12], predicted[2:4, 8:10, 11:13] = 2, 2
    return predicted, label


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (8.0, 1.25, 0.7)])
def test_the_distance_is_that_of_the_surfaces_in_millimetres(spacing: tuple[float, ...]) -> None:
    predicted, label = blobs()
    found = scores.score(predicted, label, classes=3, spacing=spacing)
    for c in (1, 2):
        a, b = predicted == c, label == c
        expected = max(np.percentile(distances(*pair, spacing), 95) for pair in ((a, b), (b, a)))
        assert found.hd95[c - 1] == pytest.approx(expected, rel=1e-5)
        assert found.dice[c - 1] == pytest.approx((2 * (a & b).sum() / (a.sum() + b.sum())).item())


def test_classes_that_are_not_there() -> None:
    predicted, label = blobs()
    same = scores.score(label, label, classes=3, spacing=(8, 1, 1))
    assert same == ([1.0, 1.0], [0.0, 0.0])
    lost = scores.score(predicted.clamp(max=1), label, classes=4, spacing=(8, 1, 1))
    assert lost.hd95[1] == inf
    assert isnan(lost.hd95[2])
    assert lost.dice[1] == 0
    assert isnan(lost.dice[2])
    added = scores.score(label, label.clamp(max=1), classes=3, spacing=(8, 1, 1))
    assert isnan(added.hd95[1])


def test_means_leave_out_what_is_not_there() -> None:
    assert scores.mean_score([[0.5, nan], [0.7, 0.2]]) == pytest.approx((0.6 + 0.2) / 2)
    assert scores.mean_score([[3.0, inf], [5.0, 6.0]]) == pytest.approx((4 + 6) / 2)
    assert scores.missed([[3.0, inf], [nan, inf]]) == 2
