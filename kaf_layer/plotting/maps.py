"""Draws which places of a feature map are similar to one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer.keypoints import Keypoints
from kaf_layer.plotting.image import draw_image
from kaf_layer.sampling import sample_keypoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["draw_similarity", "self_similarity"]


def self_similarity(
    features: Annotated[Tensor, "C *S"], position: Sequence[float], image_size: Sequence[int]
) -> Annotated[Tensor, "*S"]:
    """The cosine similarity of every cell of a feature map with the features at one point.

    Args:
        features: (C, *S), the map of one image.
        position: the query point, (x, y) or (x, y, z), in pixels of the image.
        image_size: the size of the image in tensor order.

    Returns:
        (*S), from -1 to 1.

    Raises:
        ValueError: if the position, the image and the map have different numbers of axes.

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
    """Draws a similarity map over an image, and marks the query point with a star.

    Args:
        axes: matplotlib axes.
        image: (H, W).
        similarity: a map of any size, as [self_similarity][kaf_layer.plotting.self_similarity] gives it.
        position: the query point, (x, y), in pixels of the image.
        style: options of ``Axes.imshow`` for the map.

    Returns:
        The map as drawn, for a colour bar.

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
