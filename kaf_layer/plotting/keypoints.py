"""Draws keypoints, and lines between matched ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from kaf_layer.keypoints import Keypoints
from kaf_layer.matching import Matches
from kaf_layer.plotting.image import draw_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_keypoints", "draw_matches", "positions_of_one"]


def draw_keypoints(axes: Axes, image: Annotated[Tensor, "H W"] | None, keypoints: Keypoints, **style: Any) -> int:
    """Draws an image and the keypoints of one sample; returns the number of keypoints.

    Args:
        axes: matplotlib axes.
        image: (H, W). None draws on what the axes already show, in pixels of the image.
        keypoints: the keypoints of one sample, in 2-D.
        style: options of ``Axes.scatter``; by default yellow dots.

    Raises:
        ValueError: if the keypoints are a batch, or not 2-D.

    Example:
        >>> from matplotlib.figure import Figure
        >>> keypoints = Keypoints(torch.rand(5, 2) * 8, torch.arange(5) < 3, (8, 8))
        >>> draw_keypoints(Figure().subplots(), torch.rand(8, 8), keypoints)
        3
    """
    positions = positions_of_one(keypoints)[keypoints.valid.cpu()]
    if image is not None:
        draw_image(axes, image)
    own: dict[str, Any] = {"s": 9, "c": "yellow", "edgecolors": "black", "linewidths": 0.3}
    axes.scatter(*positions.T.numpy(), **own | style)
    return len(positions)


def draw_matches(
    axes: Axes,
    image_a: Annotated[Tensor, "H W"],
    keypoints_a: Keypoints,
    image_b: Annotated[Tensor, "H W"],
    keypoints_b: Keypoints,
    matches: Matches,
    *,
    gap: int = 4,
    **style: Any,
) -> int:
    """Draws two images side by side, their keypoints, and a line between partners; returns the number of lines.

    Args:
        axes: matplotlib axes.
        image_a: (H, W), on the left.
        keypoints_a: the keypoints of one sample.
        image_b: (H, W), on the right, of the same height.
        keypoints_b: the keypoints of one sample.
        matches: the matches of this pair, in a batch of one.
        gap: the gap between the images, in pixels.
        style: options of ``Axes.plot`` for the lines. By default a line's colour shows its height in the left image.

    Raises:
        ValueError: if the images' heights differ, or the matches are not of one pair of these keypoints.

    Example:
        >>> from matplotlib.figure import Figure
        >>> keypoints = Keypoints(torch.rand(2, 2) * 8, torch.ones(2, dtype=torch.bool), (8, 8))
        >>> matches = Matches(torch.tensor([[1, -1]]), torch.tensor([[-1, 0]]))
        >>> draw_matches(Figure().subplots(), torch.rand(8, 8), keypoints, torch.rand(8, 8), keypoints, matches)
        1
    """
    left, right = positions_of_one(keypoints_a), positions_of_one(keypoints_b)
    if image_a.shape[:1] != image_b.shape[:1] or matches.indices.shape != (1, len(left)):
        raise ValueError(
            "image_a and image_b must have one height, and matches be of one pair in a batch of one, "
            f"got {image_a.shape=}, {image_b.shape=} and {matches.indices.shape=} for {len(left)} keypoints"
        )
    offset = image_a.shape[1] + gap
    for image, shift in ((image_a, 0), (image_b, offset)):
        draw_image(axes, image, extent=(shift - 0.5, shift + image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5))
    axes.set_xlim(-0.5, offset + image_b.shape[1] - 0.5)
    right = right + torch.tensor([offset, 0])
    for points, keypoints in ((left, keypoints_a), (right, keypoints_b)):
        x, y = points[keypoints.valid.cpu()].T.numpy()
        axes.scatter(x, y, s=4, c="white", linewidths=0, alpha=0.6)
    matched = matches.among(keypoints_a[None], keypoints_b[None]).indices[0].cpu()
    pairs = [(left[i].tolist(), right[j].tolist()) for i, j in enumerate(matched.tolist()) if j >= 0]
    for rank, pair in enumerate(sorted(pairs, key=lambda pair: pair[0][1])):
        own: dict[str, Any] = {"color": _rainbow((rank + 0.5) / len(pairs)), "linewidth": 0.7, "marker": ".", "ms": 3}
        axes.plot(*zip(*pair, strict=True), **own | style)
    return len(pairs)


def positions_of_one(keypoints: Keypoints) -> Annotated[Tensor, "N 2"]:
    """The positions of one sample, on the CPU and without gradient.

    Raises:
        ValueError: if the keypoints are a batch, or not 2-D.
    """
    if keypoints.positions.ndim != 2 or keypoints.spatial_dims != 2:
        raise ValueError(f"keypoints must be 2-D and of one sample (index the batch), got {keypoints}")
    return keypoints.positions.detach().float().cpu()


def _rainbow(value: float) -> tuple[float, float, float]:
    """A colour from red (0) to violet (1)."""
    from matplotlib.colors import hsv_to_rgb

    red, green, blue = hsv_to_rgb((0.8 * value, 0.75, 1.0))
    return float(red), float(green), float(blue)
