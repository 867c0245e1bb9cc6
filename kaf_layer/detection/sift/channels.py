"""Reduces images of any number of channels to the one that keypoints are detected in."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, where

__all__ = ["ChannelRule", "check_channels", "one_channel", "stretch"]

ChannelRule = int | Literal["rgb", "mean"] | None
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as in OpenCV


def check_channels(rule: ChannelRule, images: Annotated[Tensor, "B C *S"]) -> None:
    """Checks that images have the channels that a rule needs."""
    count = images.shape[1]
    if not count or (rule == "rgb" and count != 3) or (isinstance(rule, int) and rule >= count):
        raise ValueError(f"images must have the channels that the rule needs, got {images.shape=} for channel={rule!r}")


def one_channel(
    images: Annotated[Tensor, "B C *S"], rule: ChannelRule, *, normalize: bool
) -> Annotated[Tensor, "B *S"]:
    """The channel with the given number; the luma of RGB; or the mean of the channels, each stretched first."""
    count = images.shape[1]
    if count == 1 or isinstance(rule, int):
        return images[:, rule if isinstance(rule, int) else 0]
    if rule == "rgb" or (rule is None and count == 3):
        red, green, blue = (weight * channel for weight, channel in zip(LUMA, images.unbind(1), strict=True))
        return red + green + blue
    return (stretch(images, 2) if normalize else images).mean(1)


def stretch(images: Tensor, first: int) -> Tensor:
    """Maps the minimum and maximum over the axes from ``first`` on to 0 and 1; constants become 0."""
    axes = tuple(range(first, images.ndim))
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    return (images - low) / where(high > low, high - low, 1.0)
