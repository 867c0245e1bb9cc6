"""Draws what one keypoint attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor

from kaf_layer.keypoints import Keypoints
from kaf_layer.plotting.image import draw_image
from kaf_layer.plotting.keypoints import positions_of_one

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

__all__ = ["draw_attention"]


def draw_attention(
    axes: Axes,
    image: Annotated[Tensor, "H W"],
    keypoints: Keypoints,
    weights: Annotated[Tensor, "*L N N"],
    query: int,
    **style: Any,
) -> PathCollection:
    """Draws how much one keypoint takes from each other keypoint.

    Every keypoint is a dot. The more the query attends to it, the brighter and larger it is. A star marks the query.

    Args:
        axes: matplotlib axes.
        image: (H, W).
        keypoints: the keypoints of one sample, in 2-D.
        weights: (..., N, N), of the same sample, as [record_attention][kaf_layer.record_attention] gives them.
            Leading axes, such as blocks and heads, are averaged. Index them to see one block (``weights[-1]``) or one
            head (``weights[-1, 0]``).
        query: the slot of the keypoint that attends.
        style: options of ``Axes.scatter``.

    Returns:
        The dots, for a colour bar.

    Raises:
        ValueError: if the keypoints are a batch or not 2-D, the weights are not those of as many keypoints, or the
            query is not the slot of a keypoint.

    Example:
        >>> from matplotlib.figure import Figure
        >>> keypoints = Keypoints(torch.rand(5, 2) * 8, torch.arange(5) < 3, (8, 8))
        >>> weights = torch.rand(2, 4, 5, 5).softmax(dim=-1)  # 2 blocks of 4 heads
        >>> len(draw_attention(Figure().subplots(), torch.rand(8, 8), keypoints, weights, query=1).get_offsets())
        3
    """
    positions, valid = positions_of_one(keypoints), keypoints.valid.cpu()
    slots = len(positions)
    if weights.shape[-2:] != (slots, slots):
        raise ValueError(f"weights must be (..., {slots}, {slots}), of the same keypoints, got {weights.shape=}")
    if not (0 <= query < slots and valid[query]):
        raise ValueError(f"query must be the slot of a valid keypoint, got {query=} of {slots} slots")
    row = weights.detach().float().cpu().reshape(-1, slots, slots).mean(dim=0)[query, valid]
    draw_image(axes, image)
    order = row.argsort()  # the keypoint that is attended to most is drawn last, on top
    share = row[order] / row.max()
    own: dict[str, Any] = {"c": row[order], "s": 6 + 60 * share, "cmap": "inferno", "vmin": 0.0}
    own |= {"edgecolors": "white", "linewidths": 0.4}
    drawn = axes.scatter(*positions[valid][order].T.numpy(), **own | style)
    x, y = positions[query].tolist()
    axes.plot(x, y, marker="*", color="cyan", markersize=11, markeredgecolor="black", markeredgewidth=0.6)
    return drawn
