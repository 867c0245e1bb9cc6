"""Scores of the predicted labels of a volume, by class: Dice, and the distance between surfaces."""

import warnings
from collections.abc import Sequence
from math import inf, isinf, nan
from typing import Any, NamedTuple

import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance
from torch import Tensor


class Scores(NamedTuple):
    """The scores of each class except the background; NaN for a class that the reference lacks."""

    dice: list[float]
    hd95: list[float]  # in millimetres; infinite for a class that only the reference has


def score(predicted: Tensor, label: Tensor, *, classes: int, spacing: Sequence[float]) -> Scores:
    """Compares labels (Z, H, W) whose voxels have a spacing along these axes in millimetres."""
    # The call returns the values. Its aggregate() would wait for other processes, which test nothing.
    metric = DiceMetric(include_background=False, reduction="none", num_classes=classes)
    dice = metric(predicted[None, None], label[None, None])[0].tolist()
    return Scores(dice, [hd95(predicted == c, label == c, spacing=spacing) for c in range(1, classes)])


def hd95(predicted: Tensor, region: Tensor, *, spacing: Sequence[float]) -> float:
    """The 95th percentile of the distances from one surface to the other, the larger of both directions, in mm."""
    if not region.any():
        return nan
    if not predicted.any():
        return inf
    pair = predicted[None, None], region[None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 and later warn about one of their own calls
        distance = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(spacing))
    return float(distance)


def mean_score(rows: Sequence[Sequence[float]]) -> float:
    """The mean over classes of the mean over volumes; NaN and infinite distances are left out."""
    values = torch.tensor(rows)
    return float(values.where(values.isfinite(), torch.nan).nanmean(0).nanmean())


def missed(rows: Sequence[Sequence[Any]]) -> int:
    """The number of classes that were not found at all, summed over volumes."""
    return sum(isinf(value) for row in rows for value in row)
