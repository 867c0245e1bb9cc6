"""Volumes in which context matters: two organs that look alike lie on either side of a third, which identifies them.

The spine identifies the kidneys in the same way. All three organs vary in size and place. The third is farther from the
other two than the receptive field of a small network reaches.
"""

import numpy as np
import torch

from examples.protocol.volumes.volume import Array, Volume

LABELS = ("background", "left of the third organ", "right of it")


def situs(subject: int, *, size: tuple[int, int] = (144, 80), slices: int = 6) -> Volume:
    """The volume of one subject, which its number determines.

    Args:
        subject: 0 or more. If it is even, the organ on the left is above the one on the right.
        size: (H, W).
        slices: the number of slices.
    """
    rng = np.random.default_rng([subject, 7])
    height, width = size
    z, y, x = np.meshgrid(
        np.linspace(-1, 1, slices), np.arange(height) / height, np.arange(width) / height, indexing="ij"
    )

    def draw(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def organ(centre: tuple[float, float], a: float, b: float) -> Array:
        """Above 0 inside an ellipse that shrinks towards the first and the last slice."""
        dx, dy, turn = x - centre[0], y - centre[1], draw(-0.4, 0.4)
        u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        return 1 - 0.3 * z**2 - np.hypot(u / a, v / b)

    # Lengths are in heights of the image.
    middle = draw(0.14, width / height - 0.14)
    rows = (draw(0.48, 0.53), draw(0.83, 0.88))
    left, right = rows[:: -1 if subject % 2 else 1]
    pair = [
        organ((middle + side * draw(0.05, 0.09), row), draw(0.032, 0.042), draw(0.035, 0.05))
        for side, row in ((-1, left), (1, right))
    ]
    third = organ((middle, draw(0.12, 0.17)), draw(0.035, 0.045), draw(0.022, 0.03))
    image = 0.3 + draw(0.8, 1.2) * sum(soft(depth) for depth in pair) + draw(1.2, 1.6) * soft(third)
    image = image + rng.normal(0, 0.06, image.shape)
    label = np.select([pair[0] > 0, pair[1] > 0], [1, 2], 0)
    return Volume(torch.from_numpy(image.astype(np.float32)), torch.from_numpy(label), f"situs-{subject:03d}")


def soft(depth: Array) -> Array:
    """A soft edge, a few pixels wide."""
    return np.clip(4 * depth + 0.5, 0, 1)
