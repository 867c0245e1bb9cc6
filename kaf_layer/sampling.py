"""Sampling: the values of a feature map at the keypoints (Section 3.1 of the paper)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor, nn

from kaf_layer.checks import check_features, check_floats
from kaf_layer.keypoints import Keypoints

__all__ = ["KeypointSampler", "SamplingMode", "sample_keypoints"]

SamplingMode = Literal["bilinear", "nearest"]


def sample_keypoints(
    features: Annotated[Tensor, "B C *S"],
    keypoints: Keypoints,
    *,
    mode: SamplingMode = "bilinear",
    masked: bool = True,
) -> Annotated[Tensor, "B N C"]:
    """Samples a feature map at keypoints.

    Keypoints outside the image are clamped to its border.

    Args:
        features: (B, C, *S), a map of the keypoints' image, each axis of which is divided by a whole stride. For
            "nearest" it may hold integers, such as labels.
        keypoints: a batch with N slots per sample.
        mode: "bilinear" interpolates (trilinearly in 3-D), and is differentiable with respect to the positions.
            "nearest" takes the value of the keypoint's cell, as the authors' code does.
        masked: whether slots that are not valid become zero. Otherwise they hold the values of the map's first cell.
            False saves a step where the next module masks them, as
            [KeypointTransformer][kaf_layer.KeypointTransformer] does.

    Returns:
        (B, N, C), one value per slot and channel.

    Raises:
        TypeError: if ``features`` is not a tensor or ``keypoints`` is not ``Keypoints``.
        ValueError: if the features are not a map of the keypoints' image, or the mode is unknown.

    Example:
        >>> features = torch.arange(6.0).view(1, 1, 2, 3)
        >>> keypoints = Keypoints(torch.tensor([[[1.5, 0.0]]]), torch.ones(1, 1, dtype=torch.bool), (2, 3))
        >>> sample_keypoints(features, keypoints).item()
        1.5
    """
    check_features(features, keypoints)
    if mode == "nearest":
        sampled = _gather(features, keypoints.cells(features.shape[2:]))
    elif mode == "bilinear":
        check_floats(features=features)
        sampled = _interpolate(features, keypoints.positions_in(features.shape[2:]))
    else:
        raise ValueError(f"mode must be one of {get_args(SamplingMode)}, got {mode=}")
    return sampled.where(keypoints.valid[..., None], 0) if masked else sampled


def _gather(features: Annotated[Tensor, "B C *S"], index: Annotated[Tensor, "B N"]) -> Annotated[Tensor, "B N C"]:
    """The values of cells. Their gradient has the map's memory format, like those to which it is added."""
    # Gather, not grid_sample: on CUDA its backward pass can be deterministic.
    channels, pixels = features.shape[1], features.flatten(2)
    if features.is_contiguous():
        return pixels.gather(2, index[:, None].expand(-1, channels, -1)).mT
    return pixels.mT.gather(1, index[..., None].expand(-1, -1, channels))


def _interpolate(
    features: Annotated[Tensor, "B C *S"], positions: Annotated[Tensor, "B N D"]
) -> Annotated[Tensor, "B N C"]:
    """The mean of the 2**D cells around each position, weighted by their overlap with a cell centred there."""
    index: Any = None
    weight: Any = None
    stride = 1  # in rows, from one cell to the next along the axis; the map's last axis comes first
    for p, length in zip(positions[:, None].unbind(-1), reversed(features.shape[2:]), strict=True):
        p = p.clamp(0, length - 1)
        low = p.detach().floor().clamp(max=max(length - 2, 0))  # the next cell is in the map too
        upper = p - low
        index = low.long() if index is None else torch.add(index, low.long(), alpha=stride)
        index = torch.cat([index, index + (stride if length > 1 else 0)], dim=1)
        above = upper if weight is None else weight * upper
        weight = torch.cat([1 - upper if weight is None else weight - above, above], dim=1)
        stride = stride * length
    # One gather for all corners, since each would allocate a dense gradient of its own.
    corners = torch.unflatten(_gather(features, index.flatten(1)), 1, index.shape[1:])
    # Rounded once: weights in half precision need not add up to one.
    return (corners * weight[..., None]).sum(dim=1).to(features.dtype)


class KeypointSampler(nn.Module):
    """[sample_keypoints][kaf_layer.sample_keypoints] as a module.

    Args:
        mode: "bilinear" or "nearest".
        masked: whether slots that are not valid become zero.

    Example:
        >>> keypoints = Keypoints(torch.rand(2, 5, 2) * 8, torch.ones(2, 5, dtype=torch.bool), (8, 12))
        >>> KeypointSampler()(torch.rand(2, 16, 4, 6), keypoints).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, mode: SamplingMode = "bilinear", *, masked: bool = True) -> None:
        super().__init__()
        if mode not in get_args(SamplingMode):
            raise ValueError(f"mode must be one of {get_args(SamplingMode)}, got {mode=}")
        self.mode: SamplingMode = mode
        self.masked = masked

    def forward(self, features: Annotated[Tensor, "B C *S"], keypoints: Keypoints) -> Annotated[Tensor, "B N C"]:
        """Samples a feature map at keypoints.

        Args:
            features: (B, C, *S).
            keypoints: of the image that the map belongs to.

        Returns:
            (B, N, C).
        """
        return sample_keypoints(features, keypoints, mode=self.mode, masked=self.masked)

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return repr(self.mode) if self.masked else f"{self.mode!r}, masked=False"
