"""The augmentation of training images, and of volumes in one piece."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from kornia.augmentation import RandomAffine, RandomAffine3D
from kornia.geometry.transform import warp_affine3d
from torch import Tensor, nn

from kaf_layer import KeypointDetector
from kaf_layer.augmentation import KeypointAugmentation


class Augmentation(nn.Module):
    """Rotates, shifts and scales images or volumes, keypoints and labels, and changes contrast and brightness.

    The image is mirrored at its border, so that there is no empty frame. From a frame, attention, which sees the whole
    image, could learn how the image was moved, and so where the organs of the few training subjects are.

    Args:
        drop_keypoints: each sample loses a random share of its keypoints, between none and this share.
        detector: detects keypoints again in the augmented images, instead of moving them. It is for the keypoints of a
            grid, which would show how they were moved, and for those of volumes.
        spatial_dims: 3 for volumes.
    """

    def __init__(
        self, *, drop_keypoints: float = 0.0, detector: KeypointDetector | None = None, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        self.drop_keypoints, self.detector = drop_keypoints, detector
        move = {"degrees": 15.0, "translate": (0.1,) * spatial_dims, "scale": (0.8, 1.25), "p": 1.0}
        self.move = (
            KeypointAugmentation(RandomAffine(**move, padding_mode="reflection"))
            if spatial_dims == 2
            else VolumeAugmentation(RandomAffine3D(**move))
        )

    def forward(self, images: Tensor, keypoints: Any, labels: Tensor | None = None) -> Any:
        images, keypoints, labels = self.move(images, keypoints, labels)
        if self.detector is not None:
            keypoints = self.detector(images)
        images = vary(images)
        if self.drop_keypoints:
            valid = keypoints.valid
            shares = self.drop_keypoints * torch.rand(len(images), 1, device=valid.device)
            kept = torch.rand(valid.shape, device=valid.device) >= shares
            keypoints = replace(keypoints, valid=valid & kept, padded=True)
        return images, keypoints, labels


class VolumeAugmentation(nn.Module):
    """Moves volumes (B, 1, D, H, W) and labels (B, D, H, W), mirrored at the border. Keypoints do not change.

    The affine transform is Kornia's. Kornia's warping is not used, since it leaves an empty frame.
    """

    def __init__(self, affine: RandomAffine3D) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, images: Tensor, keypoints: Any, labels: Tensor | None = None) -> Any:
        parameters = self.affine.forward_parameters(images.shape)
        matrix = self.affine.compute_transformation(images, parameters, self.affine.flags)[:, :3]
        depth, height, width = images.shape[2:]
        warp = partial(
            warp_affine3d, M=matrix, dsize=(depth, height, width), padding_mode="reflection", align_corners=False
        )
        if labels is not None:
            labels = warp(labels[:, None].to(images), flags="nearest")[:, 0].to(labels.dtype)
        return warp(images), keypoints, labels


def vary(images: Tensor) -> Tensor:
    """Changes the contrast and brightness of each image."""
    each = (len(images), *[1] * (images.ndim - 1))
    contrast = torch.empty(each, device=images.device).uniform_(0.6, 1.5).to(images.dtype)
    brightness = torch.empty(each, device=images.device).uniform_(-0.2, 0.2).to(images.dtype)
    return images * contrast + brightness
