"""GLCL: a global contrast between partitions of volumes, and a local one between regions of maps.

Chaitanya et al., "Contrastive learning of global and local features for medical image segmentation with limited
annotations", 2020. The four partitions, the global contrast G^D, the local contrast L^R, the number and size of its
regions and the temperature are the paper's. The paper trains the decoder after the encoder, which is then frozen. Here
both are trained at the same time, and the local contrast gives the encoder no gradient.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.protocol.methods.base import Pretraining, Slice, Slices, head, pooled, views
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation, vary
from examples.unet import Decoder
from kaf_layer import Keypoints

PARTITIONS = 4
REGIONS, REGION = 13, 3  # the number of regions in a map, and the pixels to a side of each


class GlobalGLCL(Pretraining):
    """Slices in the same quarter of any volumes are similar, and differ from slices in other quarters."""

    def __init__(self, network: nn.Module, samples: Sequence[Slice], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        self.contrast_temperature: float = options.temperature
        self.projector = head(self.channels, self.embed_dim, self.embed_dim)

    def draw(self, batch: Slices, augment: Augmentation) -> tuple[Any, ...]:
        return *views(batch, augment, count=2), (batch.positions.repeat(2) * PARTITIONS).long()

    def forward(self, images: Tensor, keypoints: Keypoints, partitions: Tensor) -> dict[str, Tensor]:
        embeddings = self.projector(self.embed(images, keypoints))
        return {"loss": partition_contrast(embeddings, partitions, temperature=self.contrast_temperature)}


class GLCL(GlobalGLCL):
    """The global contrast, and maps of the decoder that distinguish places, whatever the contrast and brightness.

    All blocks of a UNet's decoder except the last are trained: three of four, as in the paper.
    """

    def __init__(self, network: nn.Module, samples: Sequence[Slice], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        decoder = getattr(network, "decoder", None)
        if not isinstance(decoder, Decoder):
            raise ValueError(f"glcl pretrains the decoder of a UNet, got --model {options.model}; try glcl-global")
        self.ups, self.blocks = decoder.ups[:-1], decoder.blocks[:-1]
        channels = cast("nn.ConvTranspose2d", self.ups[-1]).out_channels
        self.local_head = nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, self.embed_dim, 1)
        )

    def draw(self, batch: Slices, augment: Augmentation) -> tuple[Any, ...]:
        """The third view is the first one with another contrast and brightness."""
        images, keypoints, partitions = super().draw(batch, augment)
        count = len(batch.images)
        again = torch.arange(3 * count, device=images.device) % (2 * count)
        return torch.cat([images, vary(images[:count])]), keypoints[again], partitions

    def parts(self) -> list[nn.Module]:
        return [self.encoder, self.ups, self.blocks]

    def forward(self, images: Tensor, keypoints: Keypoints, partitions: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images, keypoints).features
        embeddings = self.projector(pooled(features[-1][: len(partitions)]))
        loss = partition_contrast(embeddings, partitions, temperature=self.contrast_temperature)
        first, _, third = self.local_head(self.decode(features)).chunk(3)
        local = region_contrast(*regions(first, third), temperature=self.contrast_temperature)
        return {"loss": loss + local, "global": loss.detach(), "local": local.detach()}

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """The map of the last block that is trained."""
        *skips, x = (feature.detach() for feature in features)
        for up, block, skip in zip(self.ups, self.blocks, reversed(skips), strict=False):
            x = block(torch.cat([up(x), skip], dim=1))
        return x


def partition_contrast(embeddings: Tensor, partitions: Tensor, *, temperature: float) -> Tensor:
    """The mean of -log(exp(s_ap) / (exp(s_ap) + sum over n of exp(s_an))), with a and p of one partition, n of others.

    Args:
        embeddings: (B, E).
        partitions: (B,).
        temperature: divides the cosine similarities s.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    similarity = unit @ unit.T / temperature
    same = partitions[:, None] == partitions
    pairs = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    negatives = similarity.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    losses = torch.logaddexp(similarity, negatives) - similarity
    return losses.where(pairs, 0.0).sum() / pairs.sum().clamp(min=1)


def regions(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The same random regions of two maps (B, C, H, W), as two tensors (B, R, 9 C)."""
    one, other = (F.unfold(features, REGION, stride=REGION).mT for features in (one, other))
    chosen = torch.randperm(one.shape[1], device=one.device)[:REGIONS]
    return one[:, chosen], other[:, chosen]


def region_contrast(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent within each image: each region (B, R, C) must find itself in the other map, among all regions of both."""
    unit = F.normalize(torch.cat([one, other], dim=1).float(), dim=2)
    count = unit.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=unit.device)
    similarity = (unit @ unit.mT / temperature).masked_fill(itself, -torch.inf)
    partner = torch.arange(count, device=unit.device).roll(count // 2).expand(len(unit), -1)
    return F.cross_entropy(similarity.flatten(0, 1), partner.flatten())
