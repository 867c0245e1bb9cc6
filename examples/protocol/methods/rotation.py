"""Rotation (Gidaris et al., "Unsupervised representation learning by predicting image rotations", 2018)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.protocol.methods.base import Pretraining, Slice, Slices, crop, head, join, views
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation
from kaf_layer import Keypoints
from kaf_layer.augmentation import move_keypoints


class Rotation(Pretraining):
    """Predicts by how many quarters each slice was turned.

    A batch contains each slice in all four turns, so it has twice the images of other methods. If a patch is not
    square, its central square is turned.
    """

    def __init__(self, network: nn.Module, samples: Sequence[Slice], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        self.head = head(self.channels, 4)

    def draw(self, batch: Slices, augment: Augmentation) -> tuple[Any, ...]:
        images, keypoints = middle(*views(batch, augment))
        turned = [turn(images, keypoints, times) for times in range(4)]
        turns = torch.arange(4, device=images.device).repeat_interleave(len(images), output_size=4 * len(images))
        return torch.cat([images for images, _ in turned]), join([keypoints for _, keypoints in turned]), turns

    def forward(self, images: Tensor, keypoints: Keypoints, turns: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embed(images, keypoints))
        return {"loss": F.cross_entropy(logits, turns), "accuracy": (logits.argmax(1) == turns).float().mean()}


def middle(images: Tensor, keypoints: Keypoints) -> tuple[Tensor, Keypoints]:
    """The largest square around the centre of images (B, C, H, W)."""
    edge = min(images.shape[2:])
    top, left = ((size - edge) // 2 for size in images.shape[2:])
    return crop(images, keypoints, (top, left), (edge, edge))


def turn(images: Tensor, keypoints: Keypoints, times: int) -> tuple[Tensor, Keypoints]:
    """Turns square images and their keypoints counter-clockwise by a number of quarters."""
    edge = images.shape[-1]

    def move(positions: Tensor) -> Tensor:
        for _ in range(times):
            x, y = positions.unbind(-1)
            positions = torch.stack([y, edge - 1 - x], dim=-1)
        return positions

    return torch.rot90(images, times, (2, 3)), move_keypoints(keypoints, move, (edge, edge))
