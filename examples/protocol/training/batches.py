"""Batches: which samples they hold, and their tensors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from examples.protocol.volumes.stacks import Stack
from kaf_layer import Keypoints

Sample = tuple[Stack, int]  # a volume and the number of a slice in it; 0 for all of the volume


class Batch(NamedTuple):
    """Slices, or volumes in one piece, with their keypoints and labels."""

    images: Tensor  # B 1 H W, or B 1 D H W
    keypoints: Keypoints
    labels: Tensor  # B H W, or B D H W


def gather(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Joins samples into a batch."""
    images = torch.stack([stack.images[z] for stack, z in samples])
    labels = torch.stack([stack.labels[z] for stack, z in samples])
    keypoints = Keypoints.stack([stack.keypoints[z] for stack, z in samples])
    return Batch(images.to(device), keypoints.to(device), labels.to(device))


def slices_of(stacks: Sequence[Stack]) -> list[Sample]:
    """All slices of some volumes."""
    return [(stack, z) for stack in stacks for z in range(len(stack.images))]


def draw_batches(count: int, size: int, steps: int, *, seed: int) -> list[list[int]]:
    """Full batches of sample numbers: every sample once before any is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(steps * size / count))])
    return order[: steps * size].view(steps, size).tolist()
