"""PIRL (Misra and van der Maaten, "Self-supervised learning of pretext-invariant representations", 2020): jigsaws."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor, nn

from examples.protocol.methods.base import Pretraining, Slice, Slices, crop, head, join, views
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation
from kaf_layer import Keypoints

GRID = 3  # patches to a side


class PIRL(Pretraining):
    """A slice and its shuffled jigsaw are similar to the memory of the slice, and differ from that of all other slices.

    The memory is a running mean of each slice's embedding. The loss is Eq. 5 of the paper, with all other slices as
    negatives. The slice and its jigsaw each have a weight of one half.
    """

    memory: Tensor

    def __init__(self, network: nn.Module, samples: Sequence[Slice], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        self.contrast_temperature: float = options.temperature
        self.head = head(self.channels, self.embed_dim)
        self.patch_head = head(self.channels, self.embed_dim)
        self.jigsaw_head = nn.Linear(GRID**2 * self.embed_dim, self.embed_dim)
        self.register_buffer("memory", F.normalize(torch.randn(len(samples), self.embed_dim), dim=1))

    def draw(self, batch: Slices, augment: Augmentation) -> tuple[Any, ...]:
        images, keypoints = views(batch, augment, count=2)
        count = len(batch.images)
        pieces, piece_keypoints = cut(images[count:], keypoints[count:], self.stride)
        order = torch.rand(count, GRID**2, device=images.device).argsort(dim=1)
        return images[:count], keypoints[:count], pieces, piece_keypoints, order, batch.numbers

    def forward(
        self,
        images: Tensor,
        keypoints: Keypoints,
        pieces: Tensor,
        piece_keypoints: Keypoints,
        order: Tensor,
        numbers: Tensor,
    ) -> dict[str, Tensor]:
        whole = F.normalize(self.head(self.embed(images, keypoints)), dim=1)
        parts = self.patch_head(self.embed(pieces, piece_keypoints)).unflatten(0, (-1, GRID**2))
        shuffled = parts.gather(1, order[..., None].expand_as(parts))
        jigsaw = F.normalize(self.jigsaw_head(shuffled.flatten(1)), dim=1)
        memory = self.memory.clone()
        losses = [noise_contrast(z, memory, numbers, temperature=self.contrast_temperature) for z in (whole, jigsaw)]
        self.remember(whole.detach(), numbers)
        return {"loss": (losses[0] + losses[1]) / 2, "whole": losses[0].detach(), "jigsaw": losses[1].detach()}

    def remember(self, embeddings: Tensor, numbers: Tensor) -> None:
        """Moves the memory of the slices of all processes halfway to their embeddings."""
        embeddings, numbers = gather(embeddings), gather(numbers)
        self.memory[numbers] = F.normalize((self.memory[numbers] + embeddings.to(self.memory)) / 2, dim=1)


def noise_contrast(embeddings: Tensor, memory: Tensor, numbers: Tensor, *, temperature: float) -> Tensor:
    """Noise-contrastive estimation (Eqs. 4 and 5): each embedding (B, E) matches one memory (N, E), and no other.

    Let h be the share of a memory's exp(similarity / temperature) in the sum over all memories. The loss is the sum of
    -log h for the slice's own memory and -log(1 - h) for each other one, and its mean over the batch.
    """
    logits = embeddings.float() @ memory.T / temperature
    own = F.one_hot(numbers, len(memory)).bool()
    likelihood = logits.log_softmax(dim=1)
    others = torch.log1p(-likelihood.exp().clamp(max=1 - 1e-6))
    return -torch.where(own, likelihood, others).sum(dim=1).mean()


def cut(images: Tensor, keypoints: Keypoints, divisor: int) -> tuple[Tensor, Keypoints]:
    """The 3x3 pieces of each image, row by row: (9 B, C, h, w), with gaps, h and w divisible by ``divisor``."""
    cells = [size // GRID for size in images.shape[2:]]
    height, width = (cell // divisor * divisor for cell in cells)
    if not height or not width:
        raise ValueError(f"pieces of a jigsaw need a --patch of {GRID * divisor} pixels or more, got {images.shape=}")
    pieces, moved = [], []
    for row in range(GRID):
        for column in range(GRID):
            piece, inside = crop(images, keypoints, (row * cells[0], column * cells[1]), (height, width))
            pieces.append(piece)
            moved.append(inside)
    stacked = torch.stack(pieces, dim=1).flatten(0, 1)
    joined = join(moved)  # ordered by piece, whereas the images are ordered by image
    return stacked, joined[torch.arange(len(stacked)).view(GRID**2, -1).T.flatten()]
