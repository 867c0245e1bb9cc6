"""Batches: which samples they contain, how they are loaded, and how they are moved to a device."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from examples.protocol.volumes.stacks import Stack
from kaf_layer import Keypoints

Sample = tuple[Stack, int]  # a volume and the number of a slice in it, or 0 for a volume in one piece
Item = TypeVar("Item")


class Batch(NamedTuple):
    """Slices, or volumes in one piece, with their keypoints and labels."""

    images: Tensor  # B 1 H W, or B 1 D H W
    keypoints: Keypoints
    labels: Tensor  # B H W, or B D H W


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins samples into a batch."""
    images = torch.stack([stack.images[z] for stack, z in samples])
    labels = torch.stack([stack.labels[z] for stack, z in samples])
    return Batch(images, Keypoints.stack([stack.keypoints[z] for stack, z in samples]), labels)


def gather(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Joins samples into a batch on a device."""
    images, keypoints, labels = collate(samples)
    return Batch(images.to(device), keypoints.to(device), labels.to(device))


def slices_of(stacks: Sequence[Stack]) -> list[Sample]:
    """All slices of some volumes."""
    return [(stack, z) for stack in stacks for z in range(len(stack.images))]


class Batches:
    """Loads the batches of each epoch and moves them to a device without waiting for it.

    Args:
        samples: the samples to draw batches from.
        join: makes a batch from some samples. It runs in the worker processes.
        size: the number of samples in a batch, over all processes of the training.
        device: the device to move batches to.
        workers: the number of processes that load batches. With 0, this process loads them.
        rank: the number of this process and how many there are. Each process takes its share of a batch.
    """

    def __init__(
        self,
        samples: Sequence[Item],
        join: Callable[[list[Item]], Any],
        *,
        size: int,
        device: torch.device,
        workers: int = 0,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        self.count, self.size, self.device, self.rank = len(samples), size, device, rank
        self.chosen: list[list[int]] = []
        self.loader: DataLoader[Any] = DataLoader(
            samples,  # type: ignore[arg-type]  # it takes any sequence
            batch_sampler=self.chosen,
            collate_fn=join,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own, so that the loader does not use the augmentation's
        )

    def epoch(self, steps: int, *, seed: int) -> Iterator[Any]:
        """The batches of an epoch, on the device."""
        rank, processes = self.rank
        self.chosen[:] = [batch[rank::processes] for batch in draw_batches(self.count, self.size, steps, seed=seed)]
        for batch in self.loader:
            yield send_to_device(batch, self.device, non_blocking=True)


def draw_batches(count: int, size: int, steps: int, *, seed: int) -> list[list[int]]:
    """Draws full batches of sample numbers, where every sample is drawn once before any is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(steps * size / count))])
    return order[: steps * size].view(steps, size).tolist()
