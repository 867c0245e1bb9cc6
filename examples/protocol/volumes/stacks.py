"""Stacks: volumes as slices of one size, or in one piece, with their keypoints, and the matches between slices."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from examples.protocol.volumes.loading import normalise
from examples.protocol.volumes.volume import Volume
from kaf_layer import KeypointDetector, Keypoints, Matches, match_keypoints
from kaf_layer.augmentation import move_keypoints


@dataclass
class Stack:
    """The slices of a volume, each resized, padded and cropped around its centre to a patch (H, W), with keypoints.

    Or the volume in one piece (D, H, W), which is then the only slice. ``positions`` (Z,) are relative, from 0 to below
    1. ``margins`` are the pixels added before and after each axis, the last axis first, to slices of size ``resized``.
    """

    volume: Volume
    images: Tensor  # Z 1 H W, or 1 1 D H W
    labels: Tensor  # Z H W, or 1 D H W
    keypoints: list[Keypoints]
    positions: Tensor
    margins: tuple[int, ...]
    resized: tuple[int, ...]

    def restore(self, labels: Tensor) -> Tensor:
        """Labels of the patches, (Z, H, W) or (1, D, H, W), in the volume's size, with background outside the patch."""
        size = self.volume.label.shape
        restored = resize_labels(F.pad(labels, [-margin for margin in self.margins]), size[-len(self.resized) :])
        return restored.view(size)

    def crop(self, labels: Tensor) -> Tensor:
        """Labels (Z, H, W) of the volume in the patch's size."""
        return F.pad(resize_labels(pieces(labels, len(self.resized)), self.resized), self.margins)


def prepare(
    volumes: Sequence[Volume],
    detector: KeypointDetector,
    *,
    patch: tuple[int, ...],
    resize: float = 1.0,
    by_slice: bool = False,
) -> list[Stack]:
    """Detects the keypoints of each original slice once, and brings slices, labels and keypoints to the patch's size.

    Args:
        volumes: the volumes to cut patches from.
        detector: finds the keypoints.
        patch: (H, W), the size to which resized slices are padded and cropped around their centre; or (D, H, W) for
            volumes in one piece, whose keypoints are detected in the patch.
        resize: the factor by which all sides are scaled before: images by area, labels to the nearest.
        by_slice: normalises each patch separately, for data whose slices are not on one scale.
    """
    stacks = []
    for volume in tqdm(volumes, desc="keypoints", leave=False, disable=len(volumes) == 1):
        whole = pieces(volume.image, len(patch))[:, None]
        before = whole.shape[2:]
        resized = tuple(max(1, round(edge * resize)) for edge in before)
        missing = [after - edge for edge, after in zip(resized, patch, strict=True)]
        margins = tuple(margin for m in reversed(missing) for margin in (-(-m // 2), m // 2))
        images = F.interpolate(whole, resized, mode="area")
        labels = resize_labels(pieces(volume.label, len(patch)), resized)
        if volume.label.any() and not labels.any():
            where = volume.file or volume.subject
            raise ValueError(f"{where} has no foreground left at --resize {resize:g}, give a factor nearer to 1")
        depth = len(images)
        patches = F.pad(images, margins, value=float(images.min()))
        if len(patch) == 3:
            keypoints = detector(patches)
        else:
            ratio, shift = torch.tensor(resized).flip(0) / torch.tensor(before).flip(0), torch.tensor(margins[::2])
            into_patch = partial(scale_positions, ratio=ratio, shift=shift)
            keypoints = move_keypoints(detector(whole), into_patch, patch)
        stacks.append(
            Stack(
                volume,
                torch.stack([normalise(image) for image in patches]) if by_slice else patches,
                F.pad(labels, margins),
                [compact(keypoints[z]) for z in range(depth)],
                torch.arange(depth) / depth,
                margins,
                resized,
            )
        )
    return stacks


def pieces(volume: Tensor, dims: int) -> Tensor:
    """The parts of a volume (Z, H, W) that are learnt from: its slices, or the whole as (1, Z, H, W)."""
    return volume if dims == 2 else volume[None]


def scale_positions(positions: Tensor, *, ratio: Tensor, shift: Tensor) -> Tensor:
    """Positions after a resizing and a shift."""
    return (positions + 0.5) * ratio - 0.5 + shift


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (Z, *S) in another size, where each pixel has the label of the nearest one."""
    if labels.shape[1:] == tuple(size):
        return labels
    return F.interpolate(labels[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].to(labels.dtype)


def say(stack: Stack, what: str) -> None:
    """Writes a remark about a volume to stderr without breaking the progress bars."""
    tqdm.write(f"{stack.volume.file or stack.volume.subject}: {what}", file=sys.stderr)


def compact(keypoints: Keypoints) -> Keypoints:
    """One sample without its empty slots. A sample without keypoints keeps one."""
    keep = keypoints.valid.clone()
    keep[0] |= not keep.any()
    return keypoints[keep]


def match_slices(a: Keypoints, b: Keypoints, *, max_distance: float = 30.0) -> Matches:
    """The matches of two slices. Keypoints without descriptors, such as those of a grid, match the nearest."""
    pair = [replace(k, descriptors=k.positions) if k.descriptors is None else k for k in (a.stack([a]), b.stack([b]))]
    return match_keypoints(*pair, max_distance=max_distance)


def stack_matches(matches: Sequence[Matches], slots: int) -> Matches:
    """Joins the matches of single pairs into a batch with this number of slots on each side."""
    padded = [[F.pad(side, (0, slots - side.shape[1]), value=-1) for side in (m.indices, m.inverse)] for m in matches]
    return Matches(*(torch.cat(sides) for sides in zip(*padded, strict=True)))
