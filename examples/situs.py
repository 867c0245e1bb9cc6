"""Volumes in which context matters: two organs that look alike, told apart by the side on which a third one lies.

As kidneys are told apart by the liver. All three differ in size and place from subject to subject, and the third is
farther from either than a small network sees.

    python examples/situs.py  # writes outputs/situs.png
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from phantom import Volume, plot

LABELS = ("background", "on the third organ's side", "on the other side")
Array = NDArray[np.float64]


def situs(subject: int, *, size: tuple[int, int] = (128, 128), slices: int = 6) -> Volume:
    """One subject's volume, determined by its number.

    Args:
        subject: 0 or more; of even ones the third organ is on the left.
        size: (H, W).
        slices: how many.
    """
    rng = np.random.default_rng([subject, 7])
    height, width = size
    z, y, x = np.meshgrid(
        np.linspace(-1, 1, slices), np.arange(height) / height - 0.5, np.arange(width) / width - 0.5, indexing="ij"
    )

    def draw(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def organ(centre: tuple[float, float], a: float, b: float, turn: float) -> Array:
        """Above 0 inside an ellipse that shrinks towards the first and the last slice."""
        dx, dy = x - centre[0], y - centre[1]
        u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        return 1 - 0.3 * z**2 - np.hypot(u / a, v / b)

    side = 1 if subject % 2 else -1
    near, far = ((sign * side * draw(0.24, 0.30), draw(0.16, 0.26)) for sign in (1, -1))
    third = side * draw(0.10, 0.24), draw(-0.28, -0.20)
    pair = [organ(centre, draw(0.045, 0.06), draw(0.05, 0.07), draw(-0.4, 0.4)) for centre in (near, far)]
    bright = draw(0.8, 1.2)
    body = np.hypot(x / draw(0.44, 0.48), y / draw(0.40, 0.46)) < 1
    image = 0.3 * body + bright * sum(soft(depth) for depth in pair)
    image = image + draw(1.2, 1.6) * soft(organ(third, draw(0.05, 0.06), draw(0.03, 0.04), draw(-0.4, 0.4)))
    image = image + rng.normal(0, 0.06, image.shape)
    label = np.select([pair[0] > 0, pair[1] > 0], [1, 2], 0)
    return Volume(torch.from_numpy(image.astype(np.float32)), torch.from_numpy(label), f"situs-{subject:03d}")


def soft(depth: Array) -> Array:
    """An edge that is a few pixels wide."""
    return np.clip(4 * depth + 0.5, 0, 1)


if __name__ == "__main__":
    plot([situs(subject) for subject in range(6)], Path("outputs/situs.png"))
