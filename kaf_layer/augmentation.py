"""Augmentation that moves keypoints and labels with the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeAlias, cast

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from kornia.geometry import transform_points
from torch import Tensor, nn

from kaf_layer.checks import check_floats, check_keypoints, check_tensors
from kaf_layer.keypoints import Keypoints
from kaf_layer.precision import at_least_float32

__all__ = ["Augmented", "KeypointAugmentation", "invert_deformation", "move_keypoints"]

Points: TypeAlias = Annotated[Tensor, "B N 2"]


class Augmented(NamedTuple):
    """Images, keypoints and labels after an augmentation; labels are None if there were none."""

    images: Annotated[Tensor, "B C H W"]
    keypoints: Keypoints
    labels: Annotated[Tensor, "B *1 H W"] | None


class KeypointAugmentation(nn.Module):
    """Applies Kornia's augmentations to images, keypoints and labels alike (the paper's Appendix B).

    A keypoint moves with the pixels under it, keeps its slot, and becomes invalid when it leaves the image.
    Descriptors and scores do not change; angles and scales follow the transform. Afterwards
    [Matches.among][kaf_layer.Matches.among] drops the matches of keypoints that have left the image.

    Args:
        *transforms: Kornia's 2-D augmentations, which are applied in this order: geometric ones with a transform
            matrix (flips, rotations, ``RandomAffine``, crops, ...), ``RandomElasticTransform``, and augmentations of
            intensity, which change neither labels nor keypoints.

    Shape:
        - images: (B, C, H, W), float.
        - keypoints: the keypoints of these images.
        - labels: (B, H, W) or (B, 1, H, W) of any type, resampled to the nearest; or None. New regions are
          0, unless a transform has another ``padding_mode``.
        - result: [Augmented][kaf_layer.Augmented]. Crops change the size of the images and ``image_size`` of the
          keypoints.

    Raises:
        TypeError: if images or labels are not tensors, or keypoints are not ``Keypoints``.
        ValueError: for other transforms, or if images, keypoints and labels do not fit.

    Example:
        >>> import kornia.augmentation as K
        >>> augment = KeypointAugmentation(K.RandomHorizontalFlip(p=1.0), K.CenterCrop((4, 6)))
        >>> keypoints = Keypoints(torch.tensor([[[1.0, 2.0], [6.0, 0.0]]]), torch.ones(1, 2, dtype=torch.bool), (4, 8))
        >>> images, moved, labels = augment(torch.rand(1, 1, 4, 8), keypoints)
        >>> moved.positions[0, 0].tolist(), moved.valid.tolist(), images.shape
        ([5.0, 2.0], [[True, True]], torch.Size([1, 1, 4, 6]))
    """

    def __init__(self, *transforms: nn.Module) -> None:
        super().__init__()
        known = K.GeometricAugmentationBase2D, K.IntensityAugmentationBase2D, K.RandomElasticTransform
        for transform in transforms:
            if not isinstance(transform, known):
                raise ValueError(
                    "transforms must be kornia's 2-D geometric augmentations with a transform matrix, "
                    f"RandomElasticTransform, or intensity augmentations, got {transform}"
                )
        self.transforms = nn.ModuleList(transforms)

    def forward(
        self,
        images: Annotated[Tensor, "B C H W"],
        keypoints: Keypoints,
        labels: Annotated[Tensor, "B *1 H W"] | None = None,
    ) -> Augmented:
        """Draws an augmentation for each image and applies it.

        Args:
            images: (B, C, H, W), float.
            keypoints: the keypoints of these images.
            labels: (B, H, W) or (B, 1, H, W), or None.
        """
        _check(images, keypoints, labels)
        sources = _pixels(images)
        for transform in self.transforms:
            images = _apply(transform, images)
            if isinstance(transform, K.IntensityAugmentationBase2D):
                continue
            if isinstance(transform, K.GeometricAugmentationBase2D):
                matrix = cast("Tensor", transform.transform_matrix)
                move = partial(transform_points, matrix.to(keypoints.positions.dtype))
            else:
                warped = _apply(transform, _pixels(images)[:, :2], params=transform._params, padding_mode="border")
                move = partial(invert_deformation, warped)
            keypoints = move_keypoints(keypoints, move, (images.shape[2], images.shape[3]))
            if labels is not None:
                sources = _apply(transform, sources, params=transform._params)
        return Augmented(images, keypoints, None if labels is None else _resample(labels, sources))


def move_keypoints(keypoints: Keypoints, move: Callable[[Points], Points], size: tuple[int, ...]) -> Keypoints:
    """Moves keypoints by any mapping of the plane.

    Args:
        keypoints: keypoints of 2-D images.
        move: maps positions (B, N, 2), in (x, y) order, to new positions, or to NaN where there is none.
        size: (H, W) of the images afterwards. Keypoints that leave them become invalid.

    Example:
        >>> keypoints = Keypoints(torch.tensor([[[1.0, 2.0], [6.0, 0.0]]]), torch.ones(1, 2, dtype=torch.bool), (4, 8))
        >>> moved = move_keypoints(keypoints, lambda positions: positions + 2, (4, 8))
        >>> moved.positions.tolist(), moved.valid.tolist()
        ([[[3.0, 4.0], [8.0, 2.0]]], [[False, False]])
    """
    before = keypoints.positions.masked_fill(~keypoints.valid[..., None], 0.0)
    positions = move(before)
    scales, angles = keypoints.scales, keypoints.angles
    if scales is not None or angles is not None:
        # The derivative of the mapping, column by column: what a step of one pixel in x, and in y, becomes.
        steps = torch.eye(2, dtype=before.dtype, device=before.device)
        jacobian = torch.stack([(move(before + step) - move(before - step)) / 2 for step in steps], dim=-1)
        jacobian = torch.where(jacobian.isnan(), steps, jacobian)  # at the image's edge a step may lead nowhere
        if scales is not None:
            scales = scales * jacobian.det().abs().sqrt().to(scales.dtype)
        if angles is not None:
            direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
            x, y = (jacobian.to(angles.dtype) @ direction[..., None]).squeeze(-1).unbind(-1)
            angles = torch.atan2(y, x)
    # A NaN compares as outside. A tensor of the size would be a synchronising copy on CUDA.
    axes = zip(positions.unbind(-1), reversed(size), strict=True)
    inside = torch.stack([(p >= -0.5) & (p < length - 0.5) for p, length in axes], dim=-1)
    valid = keypoints.valid & inside.all(dim=-1)
    return replace(
        keypoints, positions=positions, valid=valid, image_size=tuple(size), scales=scales, angles=angles, padded=True
    )


def invert_deformation(
    sources: Annotated[Tensor, "B 2 H W"], positions: Points, *, iterations: int = 100, tolerance: float = 0.1
) -> Points:
    """Moves positions through a warp that is given by the source of each pixel of the result.

    A damped fixed-point iteration solves ``sources(p) = position``, with bilinear interpolation between pixels. It
    converges where the deformation does not fold, and shrinks the image by less than a factor of 4.

    Args:
        sources: (B, 2, H, W), the position in the original of each pixel of the result, in pixels and (x, y) order.
        positions: (B, N, 2), in the original.
        iterations: the number of iterations.
        tolerance: the error, in pixels of the original, above which a position has no counterpart in the result.

    Returns:
        (B, N, 2), positions in the result, NaN for those without a counterpart.

    Example:
        >>> x, y = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="xy")
        >>> sources = torch.stack([x + 1.5, y])[None]  # everything moves 1.5 pixels to the left
        >>> invert_deformation(sources, torch.tensor([[[4.0, 3.0]]]))
        tensor([[[2.5000, 3.0000]]])
    """
    result = positions
    for _ in range(iterations):
        result = result + (positions - _sample(sources, result)) / 2
    error = (positions - _sample(sources, result)).abs().amax(dim=-1, keepdim=True)
    return result.masked_fill(~(error <= tolerance), torch.nan)


def _apply(transform: nn.Module, images: Annotated[Tensor, "B C H W"], **options: Any) -> Annotated[Tensor, "B C h w"]:
    if len(images):
        return transform(images, **options)
    # Before kornia 0.8.3 an empty batch is an error. One image shows the shape of the result.
    return transform(images.new_zeros(1, *images.shape[1:]), **options)[:0]


def _sample(sources: Annotated[Tensor, "B 2 H W"], positions: Points) -> Points:
    grid = _grid(positions, sources)[:, None].to(sources.dtype)
    sampled = F.grid_sample(sources, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[:, :, 0].mT.to(positions.dtype)


def _pixels(images: Annotated[Tensor, "B C H W"]) -> Annotated[Tensor, "B 3 H W"]:
    """The position of every pixel, in (x, y) order, and 1."""
    dtype = at_least_float32(images.dtype)
    x, y = (torch.arange(size, dtype=dtype, device=images.device) for size in (images.shape[3], images.shape[2]))
    x, y = torch.meshgrid(x, y, indexing="xy")
    return torch.stack([x, y, torch.ones_like(x)]).expand(len(images), -1, -1, -1)


def _resample(labels: Annotated[Tensor, "B *1 H W"], sources: Annotated[Tensor, "B 3 h w"]) -> Tensor:
    """The nearest labels at positions (x, y), which are weighted by the share that lies inside the image.

    Labels are resampled once, after all transforms, since every resampling moves them by up to half a pixel.
    """
    values = labels.reshape(len(labels), 1, *labels.shape[-2:]).to(sources.dtype)
    weight = sources[:, 2:]
    grid = _grid((sources[:, :2] / weight).movedim(1, 3), values)
    grid = grid.masked_fill((weight < 0.5).movedim(1, 3), -2.0)
    result = F.grid_sample(values, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return result.reshape(*labels.shape[:-2], *result.shape[2:]).to(labels.dtype)


def _grid(positions: Annotated[Tensor, "B *N 2"], values: Annotated[Tensor, "B C H W"]) -> Annotated[Tensor, "B *N 2"]:
    """Positions as ``grid_sample`` takes them with ``align_corners=False``, which also works for maps of one row."""
    axes = zip(positions.unbind(-1), reversed(values.shape[2:]), strict=True)
    return torch.stack([(2 * p + 1) / length - 1 for p, length in axes], dim=-1)


def _check(images: Tensor, keypoints: Keypoints, labels: Tensor | None) -> None:
    check_floats(images=images)
    check_keypoints(keypoints=keypoints)
    if images.ndim != 4 or tuple(images.shape[2:]) != tuple(keypoints.image_size) or len(images) != len(keypoints):
        raise ValueError(
            "images must be (B, C, H, W), the ones that the keypoints were detected on, "
            f"got {images.shape=}, {keypoints.image_size=} and {keypoints.positions.shape=}"
        )
    if labels is None:
        return
    check_tensors(labels=labels)
    if labels.shape not in (images.shape[:1] + images.shape[2:], images[:, :1].shape):
        raise ValueError(f"labels must be (B, H, W) or (B, 1, H, W), got {labels.shape=} for {images.shape=}")
