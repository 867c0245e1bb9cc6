"""CAiD (Taher et al., "Context-aware instance discrimination for self-supervised learning in medical imaging", 2022).

CAiD combines instance discrimination with a decoder that restores the image before augmentation. Among the methods of
discrimination in the paper, this file uses SimSiam (Chen and He, 2021), which needs no large batches and no negatives.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from examples.protocol.methods.base import Pretraining, Slice, Slices, pooled, repeat
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation, vary
from kaf_layer import Keypoints

CONTEXT = 10.0  # the weight of the restoration


class CAiD(Pretraining):
    """Two views of a slice predict each other's embedding. Each also predicts its image with the original intensities.

    The decoder sees only the encoder's last map, so everything that it restores is in that map.
    """

    def __init__(self, network: nn.Module, samples: Sequence[Slice], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        width = self.embed_dim
        self.projector = nn.Sequential(
            nn.Linear(self.channels, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(width, width // 4, bias=False),
            nn.BatchNorm1d(width // 4),
            nn.ReLU(),
            nn.Linear(width // 4, width),
        )
        self.decoder = decoder(self.channels, self.stride)

    def draw(self, batch: Slices, augment: Augmentation) -> tuple[Any, ...]:
        images, keypoints, _ = augment.move(*repeat(batch, 2))
        return vary(images), keypoints, images

    def forward(self, images: Tensor, keypoints: Keypoints, originals: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images, keypoints).features[-1]
        embeddings = self.projector(pooled(features))
        instance = agreement(self.predictor(embeddings), embeddings)
        context = F.mse_loss(self.decoder(features).float(), originals)
        return {
            "loss": instance + CONTEXT * context,
            "instance": instance.detach(),
            "context": context.detach(),
            "spread": F.normalize(embeddings.detach(), dim=1).std(dim=0).mean(),  # zero if all have collapsed
        }


def agreement(predictions: Tensor, embeddings: Tensor) -> Tensor:
    """SimSiam's loss: minus the cosine of each view's prediction and the other view's embedding, without its gradient.

    Both tensors are (2 B, E). View i of the first half and view i of the second half are of the same slice.
    """
    other = embeddings.detach().roll(len(embeddings) // 2, dims=0)
    return -F.cosine_similarity(predictions.float(), other.float(), dim=1).mean()


def decoder(channels: int, stride: int) -> nn.Sequential:
    """From a map to the image: each step doubles the size and halves the channels."""
    layers: list[nn.Module] = []
    while stride > 1:
        after = max(8, channels // 2)
        layers += [nn.ConvTranspose2d(channels, after, 2, stride=2), nn.BatchNorm2d(after), nn.ReLU()]
        channels, stride = after, stride // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))
