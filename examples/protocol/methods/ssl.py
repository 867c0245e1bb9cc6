"""The pretraining of SwinUNETR: inpainting, rotation and contrastive coding at the same time.

Tang et al., "Self-supervised pre-training of Swin transformers for 3D medical image analysis", 2022. The three
losses with equal weights, the L1 norm for inpainting and the share that is cut out are the paper's. The paper learns
from volumes, which are turned around their long axis; this file learns from slices.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.protocol.methods.base import Pretraining, Slice, Slices, head, join, pooled, views
from examples.protocol.methods.caid import decoder
from examples.protocol.methods.rotation import middle, turn
from examples.protocol.methods.simclr import InstanceContrast
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation
from kaf_layer import Keypoints

SHARE = 0.3  # the share of each image that is cut out


class SSL(Pretraining):
    """Given a slice that was turned and has holes: fills the holes, predicts the turn, and finds the other view."""

    def __init__(self, network: nn.Module, samples: Sequence[Slice], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        self.decoder = decoder(self.channels, self.stride)
        self.turn_head = head(self.channels, 4)
        self.projector = head(self.channels, self.embed_dim)
        self.contrast = InstanceContrast(len(samples), temperature=options.temperature)

    def draw(self, batch: Slices, augment: Augmentation) -> tuple[Any, ...]:
        images, keypoints = middle(*views(batch, augment, count=2))
        turns = torch.randint(4, (len(images),), device=images.device)
        images, keypoints = turn_each(images, keypoints, turns)
        return cut_out(images), keypoints, images, turns, batch.numbers

    def forward(
        self, images: Tensor, keypoints: Keypoints, originals: Tensor, turns: Tensor, numbers: Tensor
    ) -> dict[str, Tensor]:
        features = self.encoder(images, keypoints).features[-1]
        inpainting = F.l1_loss(self.decoder(features).float(), originals)
        embeddings = pooled(features)
        rotation = F.cross_entropy(self.turn_head(embeddings), turns)
        contrast = self.contrast(*self.projector(embeddings).chunk(2), numbers)
        parts = {"inpainting": inpainting, "rotation": rotation, "contrast": contrast}
        return {"loss": inpainting + rotation + contrast} | {name: part.detach() for name, part in parts.items()}


def turn_each(images: Tensor, keypoints: Keypoints, turns: Tensor) -> tuple[Tensor, Keypoints]:
    """Turns each of some square images, with its keypoints, by its own number of quarters."""
    ways = [turn(images, keypoints, times) for times in range(4)]
    chosen = turns * len(images) + torch.arange(len(images), device=turns.device)
    return torch.cat([turned for turned, _ in ways])[chosen], join([moved for _, moved in ways])[chosen]


def cut_out(images: Tensor) -> Tensor:
    """Fills rectangles of images (B, C, H, W) with zeros, the mean of a volume, until they cover ``SHARE`` of each."""
    size = images.shape[2:]
    hidden = torch.zeros(len(images), 1, *size, dtype=torch.bool)
    for mask in hidden[:, 0]:
        while mask.float().mean() < SHARE:
            edges = [int(torch.randint(max(1, side // 8), side // 3 + 1, ())) for side in size]
            top, left = (int(torch.randint(side - edge + 1, ())) for side, edge in zip(size, edges, strict=True))
            mask[top : top + edges[0], left : left + edges[1]] = True
    return images.masked_fill(hidden.to(images.device, non_blocking=True), 0.0)
