"""The benchmark that counts which vertebra each vertebra is taken for."""

import torch

from benchmarks.context.vertebrae import outcomes


def test_outcomes() -> None:
    """Four vertebrae of ten voxels in a column: right, one level off, three levels off, hardly found."""
    reference = torch.zeros(1, 8, 10, dtype=torch.long)
    for row, level in ((0, 1), (2, 2), (4, 4), (6, 5)):
        reference[0, row] = level
    predicted = torch.zeros_like(reference)
    predicted[0, 0, :6] = 1
    predicted[0, 2, :4], predicted[0, 2, 4:9] = 2, 3
    predicted[0, 4] = 1
    predicted[0, 6, :4] = 5
    predicted[0, 7] = 5  # outside of every vertebra
    assert list(outcomes(predicted, reference)) == ["right", "one level off", "further off", "not found"]
