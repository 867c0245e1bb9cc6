"""What all methods of pretraining share: an encoder, the samples of batches, their augmentation, and a loss."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from examples.protocol.models.detectors import no_keypoints
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.batches import collate
from examples.protocol.volumes.stacks import Stack
from kaf_layer import Keypoints
from kaf_layer.augmentation import move_keypoints


class Slice(NamedTuple):
    """A slice of a volume, and its number among all slices of the training."""

    stack: Stack
    z: int
    number: int


class Slices(NamedTuple):
    """A batch of slices."""

    images: Tensor  # B 1 H W
    keypoints: Keypoints
    positions: Tensor  # (B,), relative
    numbers: Tensor  # (B,)


class Pretraining(nn.Module):
    """An encoder and the loss with its heads, in one module, as distributed training requires.

    A method says which ``samples`` it learns from. ``batch_of`` joins some of them, and ``draw`` makes the inputs of
    ``forward`` from that batch, on its device. ``forward`` returns the "loss" and whatever else is to be shown.
    ``parts`` are the parts of the network that the method has trained.
    """

    def __init__(self, network: nn.Module, samples: Sequence[Any], options: PretrainOptions) -> None:
        super().__init__()
        del samples
        self.encoder = cast("nn.Module", network.encoder)
        self.channels, self.stride = probe(self.encoder, options.levels)
        self.embed_dim: int = options.embed_dim

    @staticmethod
    def samples(stacks: Sequence[Stack], options: PretrainOptions) -> list[Any]:  # noqa: ARG004
        slices = [(stack, z) for stack in stacks for z in range(len(stack.images))]
        return [Slice(stack, z, number) for number, (stack, z) in enumerate(slices)]

    @staticmethod
    def batch_of(samples: Sequence[Any]) -> Any:
        images, keypoints, _ = collate([(sample.stack, sample.z) for sample in samples])
        positions = torch.stack([sample.stack.positions[sample.z] for sample in samples])
        return Slices(images, keypoints, positions, torch.tensor([sample.number for sample in samples]))

    def draw(self, batch: Any, augment: Augmentation) -> tuple[Any, ...]:
        raise NotImplementedError

    def parts(self) -> list[nn.Module]:
        return [self.encoder]

    def embed(self, images: Tensor, keypoints: Keypoints) -> Tensor:
        """The encoder's last map, averaged over its pixels: (B, C)."""
        return pooled(self.encoder(images, keypoints).features[-1])


def probe(encoder: nn.Module, levels: int) -> tuple[int, int]:
    """The channels of an encoder's last map, and the image's pixels to a side of one pixel of the map."""
    edge = max(32, 2 ** (levels - 1))
    images = torch.zeros(1, 1, edge, edge)
    with torch.no_grad():
        last = encoder.eval()(images, no_keypoints(images)).features[-1]
    encoder.train()
    return last.shape[1], edge // last.shape[-1]


def views(batch: Slices, augment: Augmentation, *, count: int = 1) -> tuple[Tensor, Keypoints]:
    """Augments each slice several times: (count B, 1, H, W), with all slices once, then all slices again."""
    images, keypoints, _ = augment(*repeat(batch, count))
    return images, keypoints


def repeat(batch: Slices, count: int) -> tuple[Tensor, Keypoints]:
    """Repeats a batch several times."""
    again = torch.arange(len(batch.images), device=batch.images.device).repeat(count)
    return batch.images[again], batch.keypoints[again]


def join(batches: Sequence[Keypoints]) -> Keypoints:
    """Joins several batches."""
    return Keypoints.stack([batch[i] for batch in batches for i in range(len(batch))])


def crop(
    images: Tensor, keypoints: Keypoints, corner: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Keypoints]:
    """Crops images (B, C, H, W) to a size (h, w) from a corner (top, left), with their keypoints."""
    (top, left), (height, width) = corner, size

    def move(positions: Tensor) -> Tensor:  # subtracts numbers, since copying a tensor of them would wait for a GPU
        x, y = positions.unbind(-1)
        return torch.stack([x - left, y - top], dim=-1)

    return images[:, :, top : top + height, left : left + width], move_keypoints(keypoints, move, size)


def pooled(features: Tensor) -> Tensor:
    """The mean over the pixels of a map."""
    return features.flatten(2).mean(dim=2)


def head(in_channels: int, *channels: int) -> nn.Sequential:
    """Linear layers with ReLU between, on normalised features.

    The averages of an untrained encoder's maps differ little between images, and so would their embeddings. The norm
    spreads them. Without it, a contrast takes long to start learning.
    """
    layers: list[nn.Module] = [nn.BatchNorm1d(in_channels), nn.Linear(in_channels, channels[0])]
    for before, after in pairwise(channels):
        layers += [nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers)
