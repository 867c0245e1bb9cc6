"""How good predicted labels of a volume are, class by class: Dice, and how far surfaces lie apart."""

import warnings
from collections.abc import Sequence
from math import inf, isinf, nan
from typing import Any, NamedTuple

import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance
from torch import Tensor


class Scores(NamedTuple):
    """Of each class but the background; NaN for a class that the reference does not have."""

    dice: list[float]
    hd95: list[float]  # millimetres; infinite for a class that the reference has and the prediction lacks


def score(predicted: Tensor, label: Tensor, *, classes: int, spacing: Sequence[float]) -> Scores:
    """Compares labels (Z, H, W) whose voxels have the given spacing along these axes, in millimetres."""
    # What the metric returns at once: its aggregate() would wait for other processes, which have nothing to test.
    metric = DiceMetric(include_background=False, reduction="none", num_classes=classes)
    dice = metric(predicted[None, None], label[None, None])[0].tolist()
    return Scores(dice, [hd95(predicted == c, label == c, spacing=spacing) for c in range(1, classes)])


def hd95(predicted: Tensor, region: Tensor, *, spacing: Sequence[float]) -> float:
    """The larger of the 95th percentiles of the distances from either surface to the other, in millimetres."""
    if not region.any():
        return nan
    if not predicted.any():
        return inf
    pair = predicted[None, None], region[None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 and later warn of a call of their own
        distance = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(spacing))
    return float(distance)


def mean_score(rows: Sequence[Sequence[float]]) -> float:
    """The mean over classes of the mean over volumes, without NaN and without infinite distances."""
    values = torch.tensor(rows)
    return float(values.where(values.isfinite(), torch.nan).nanmean(0).nanmean())


def missed(rows: Sequence[Sequence[Any]]) -> int:
    """How many classes of how many volumes were not found at all."""
    return sum(isinf(value) for row in rows for value in row)
