"""Keypoints, correspondences, self-similarity and labels, drawn on matplotlib axes (the extra ``plot``).

Each function draws on axes that the caller owns, so that figures are laid out, titled and saved as usual. Images
and maps are tensors of any device, without a batch axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.keypoints import Keypoints
from kaf_layer.matching import Matches
from kaf_layer.sampling import sample_keypoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["draw_image", "draw_keypoints", "draw_labels", "draw_matches", "draw_similarity", "self_similarity"]

# Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = ("#e69f00", "#56b4e9", "#cc79a7", "#f0e442", "#009e73", "#d55e00", "#0072b2")


def draw_image(axes: Axes, image: Annotated[Tensor, "H W"], **style: Any) -> AxesImage:
    """Shows an image in grey, from its darkest to its 99.5th percentile, without an axis.

    Args:
        axes: matplotlib's.
        image: (H, W), of any range.
        style: for ``Axes.imshow``.

    Raises:
        ValueError: if the image is not (H, W).

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().subplots()
        >>> draw_image(axes, torch.rand(8, 12)).get_size()
        (8, 12)
    """
    if image.ndim != 2:
        raise ValueError(f"image must be (H, W), take one slice and channel, got {image.shape=}")
    values = image.detach().float().cpu()
    axes.set_axis_off()
    # torch.quantile has a limit on the number of elements.
    brightest = values.flatten().sort().values[int(0.995 * (values.numel() - 1))].item()
    own: dict[str, Any] = {"cmap": "gray", "vmin": values.min().item(), "vmax": brightest}
    return axes.imshow(values.numpy(), **own | style)


def draw_keypoints(axes: Axes, keypoints: Keypoints, **style: Any) -> int:
    """Marks the keypoints of one sample; returns how many there are.

    Args:
        axes: matplotlib's, with the image drawn in its pixels.
        keypoints: of one sample, 2-D.
        style: for ``Axes.scatter``; by default yellow dots.

    Raises:
        ValueError: if the keypoints are a batch, or not 2-D.

    Example:
        >>> from matplotlib.figure import Figure
        >>> keypoints = Keypoints(torch.rand(5, 2) * 8, torch.arange(5) < 3, (8, 8))
        >>> draw_keypoints(Figure().subplots(), keypoints)
        3
    """
    positions = _positions(keypoints)[keypoints.valid.cpu()]
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
    """Shows two images side by side, their keypoints, and a line between partners; returns the number of lines.

    Args:
        axes: matplotlib's.
        image_a: (H, W), on the left.
        keypoints_a: of one sample.
        image_b: (H, W), on the right, of the same height.
        keypoints_b: of one sample.
        matches: of one pair, in a batch of one.
        gap: between the images, in pixels.
        style: for the lines, ``Axes.plot``; by default each has a colour by its height in the left image.

    Raises:
        ValueError: if the images' heights differ, or the matches are not of one pair of these keypoints.

    Example:
        >>> from matplotlib.figure import Figure
        >>> keypoints = Keypoints(torch.rand(2, 2) * 8, torch.ones(2, dtype=torch.bool), (8, 8))
        >>> matches = Matches(torch.tensor([[1, -1]]), torch.tensor([[-1, 0]]))
        >>> draw_matches(Figure().subplots(), torch.rand(8, 8), keypoints, torch.rand(8, 8), keypoints, matches)
        1
    """
    left, right = _positions(keypoints_a), _positions(keypoints_b)
    if image_a.shape[:1] != image_b.shape[:1] or matches.indices.shape != (1, len(left)):
        raise ValueError(
            "images must have one height, and matches be of one pair in a batch of one, "
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


def self_similarity(
    features: Annotated[Tensor, "C *S"], position: Sequence[float], image_size: Sequence[int]
) -> Annotated[Tensor, "*S"]:
    """The cosine similarity of every cell of a feature map with the features at one point.

    Args:
        features: (C, *S), of one image.
        position: of the query point, (x, y) or (x, y, z), in pixels of the image.
        image_size: of the image, in tensor order.

    Returns:
        the map (*S), from -1 to 1.

    Raises:
        ValueError: if the position, the image and the map differ in their number of axes.

    Example:
        >>> features = torch.stack([torch.ones(4, 6), torch.arange(6.0).expand(4, 6)])
        >>> self_similarity(features, (0.5, 0.5), (8, 12))[0, 0].item()  # the query's own cell
        1.0
    """
    if not len(position) == len(image_size) == features.ndim - 1:
        raise ValueError(
            "position and image_size must have an entry for each axis of the map, "
            f"got {position=} and {image_size=} for {features.shape=}"
        )
    features = features.detach().float()
    point = torch.tensor([[list(position)]], dtype=torch.float32, device=features.device)
    valid = torch.ones(1, 1, dtype=torch.bool, device=features.device)
    query = sample_keypoints(features[None], Keypoints(point, valid, tuple(image_size)))[0, 0]
    return F.cosine_similarity(features, query.reshape(-1, *[1] * len(image_size)), dim=0)


def draw_similarity(
    axes: Axes,
    image: Annotated[Tensor, "H W"],
    similarity: Annotated[Tensor, "h w"],
    position: Sequence[float],
    **style: Any,
) -> AxesImage:
    """Lays a similarity map over an image, and marks the query point with a star.

    Args:
        axes: matplotlib's.
        image: (H, W).
        similarity: of any size, as :func:`self_similarity` gives.
        position: of the query point, (x, y), in pixels of the image.
        style: for ``Axes.imshow`` of the map.

    Returns:
        the map as drawn, for a colour bar.

    Example:
        >>> from matplotlib.figure import Figure
        >>> drawn = draw_similarity(Figure().subplots(), torch.rand(8, 12), torch.rand(4, 6), (3.0, 2.0))
        >>> drawn.get_size()
        (4, 6)
    """
    draw_image(axes, image)
    height, width = image.shape
    own: dict[str, Any] = {"cmap": "inferno", "alpha": 0.7, "extent": (-0.5, width - 0.5, height - 0.5, -0.5)}
    drawn = axes.imshow(similarity.detach().float().cpu().numpy(), **own | style)
    axes.plot(*position, marker="*", color="cyan", markersize=9, markeredgecolor="black", markeredgewidth=0.5)
    return drawn


def draw_labels(axes: Axes, labels: Annotated[Tensor, "H W"], *, fill: float = 0.0, **style: Any) -> list[int]:
    """Draws the outline of each label but 0; returns the labels that there are.

    Args:
        axes: matplotlib's, with the image drawn in its pixels.
        labels: (H, W), whole numbers.
        fill: opacity of the inside, from 0 to 1.
        style: for ``Axes.contour``.

    Example:
        >>> from matplotlib.figure import Figure
        >>> labels = torch.zeros(8, 8, dtype=torch.long)
        >>> labels[2:5, 3:6] = 2
        >>> draw_labels(Figure().subplots(), labels)
        [2]
    """
    found = [label for label in labels.unique().tolist() if label > 0]
    for label in found:
        mask, colors = (labels == label).cpu().numpy(), [COLORS[(label - 1) % len(COLORS)]]
        if fill:
            axes.contourf(mask, levels=[0.5, 1.5], colors=colors, alpha=fill)
        own: dict[str, Any] = {"levels": [0.5], "colors": colors, "linewidths": 1.2}
        axes.contour(mask, **own | style)
    return found


def _positions(keypoints: Keypoints) -> Annotated[Tensor, "N 2"]:
    if keypoints.positions.ndim != 2 or keypoints.spatial_dims != 2:
        raise ValueError(f"keypoints must be 2-D and of one sample (index the batch), got {keypoints.positions.shape=}")
    return keypoints.positions.detach().float().cpu()


def _rainbow(value: float) -> tuple[float, float, float]:
    """A colour from red (0) to violet (1)."""
    from matplotlib.colors import hsv_to_rgb

    red, green, blue = hsv_to_rgb((0.8 * value, 0.75, 1.0))
    return float(red), float(green), float(blue)
