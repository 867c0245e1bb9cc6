"""Batches: which samples they hold, how workers join them, and how they reach a device."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from examples.protocol.volumes.stacks import Stack
from kaf_layer import Keypoints

Sample = tuple[Stack, int]  # a volume and the number of a slice in it; 0 for all of the volume
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
    """The batches of one epoch after another, loaded in the background and moved to a device without waiting for it.

    Args:
        samples: what batches are drawn from.
        join: makes a batch of some samples, in the processes of the workers.
        size: the samples in a batch.
        device: where batches are to be.
        workers: the number of processes that load batches; 0 loads them in this one.
        rank: of how many processes of the training this is, and how many there are: each takes its share of a batch.
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
            samples,  # type: ignore[arg-type]  # any sequence will do
            batch_sampler=self.chosen,
            collate_fn=join,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own: the loader must not draw from the augmentation's
        )

    def epoch(self, steps: int, *, seed: int) -> Iterator[Any]:
        """The batches of an epoch, on the device."""
        rank, processes = self.rank
        self.chosen[:] = [batch[rank::processes] for batch in draw_batches(self.count, self.size, steps, seed=seed)]
        for batch in self.loader:
            yield send_to_device(batch, self.device, non_blocking=True)


def draw_batches(count: int, size: int, steps: int, *, seed: int) -> list[list[int]]:
    """Full batches of sample numbers: every sample once before any is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(steps * size / count))])
    return order[: steps * size].view(steps, size).tolist()
