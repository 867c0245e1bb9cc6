"""Draws an image, and the outlines of its labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["COLORS", "draw_image", "draw_labels"]

# Okabe and Ito's colours, which colour-blind people can distinguish.
COLORS = ("#e69f00", "#56b4e9", "#cc79a7", "#f0e442", "#009e73", "#d55e00", "#0072b2")


def draw_image(axes: Axes, image: Annotated[Tensor, "H W"], **style: Any) -> AxesImage:
    """Draws an image in grey, from its minimum to its 99.5th percentile, without axes.

    Args:
        axes: matplotlib axes.
        image: (H, W), of any range.
        style: options of ``Axes.imshow``.

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


def draw_labels(
    axes: Axes,
    image: Annotated[Tensor, "H W"] | None,
    labels: Annotated[Tensor, "H W"],
    *,
    fill: float = 0.0,
    **style: Any,
) -> list[int]:
    """Draws an image and the outline of each label except 0; returns the labels that it found.

    Args:
        axes: matplotlib axes.
        image: (H, W). None draws on what the axes already show, in pixels of the image.
        labels: (H, W), whole numbers.
        fill: the opacity of the inside, from 0 to 1.
        style: options of ``Axes.contour``.

    Example:
        >>> from matplotlib.figure import Figure
        >>> labels = torch.zeros(8, 8, dtype=torch.long)
        >>> labels[2:5, 3:6] = 2
        >>> draw_labels(Figure().subplots(), torch.rand(8, 8), labels)
        [2]
    """
    if image is not None:
        draw_image(axes, image)
    found = [label for label in labels.unique().tolist() if label > 0]
    for label in found:
        mask, colors = (labels == label).cpu().numpy(), [COLORS[(label - 1) % len(COLORS)]]
        if fill:
            axes.contourf(mask, levels=[0.5, 1.5], colors=colors, alpha=fill)
        own: dict[str, Any] = {"levels": [0.5], "colors": colors, "linewidths": 1.2}
        axes.contour(mask, **own | style)
    return found
