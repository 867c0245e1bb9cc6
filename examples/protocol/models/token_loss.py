"""An auxiliary loss for fine-tuning: each token must predict the class of the pixel at its keypoint."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.unet import UNet
from kaf_layer import Keypoints


class TokenLogits(NamedTuple):
    """The logits of the pixels (B, K, H, W) and of the tokens of each layer (B, N, K)."""

    pixels: Tensor
    tokens: list[Tensor]


class WithTokenLogits(nn.Module):
    """A UNet with KAF layers that also classifies their tokens, with a linear map for each layer."""

    def __init__(self, network: UNet, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.network = network
        with torch.random.fork_rng():  # later random numbers are those without this loss
            self.heads = nn.ModuleList(nn.Linear(embed_dim, num_classes) for _ in network.encoder.layers)

    def forward(self, images: Tensor, keypoints: Keypoints) -> TokenLogits:
        features, tokens = self.network.encoder(images, keypoints)
        return TokenLogits(
            self.network.decoder(features), [head(x) for head, x in zip(self.heads, tokens, strict=True)]
        )


def token_loss(logits: list[Tensor], keypoints: Keypoints, labels: Tensor) -> Tensor:
    """The cross-entropy of tokens with the labels (B, H, W) at their keypoints, averaged over valid ones and layers."""
    targets = labels.flatten(1).gather(1, keypoints.cells(labels.shape[1:]))
    valid = keypoints.valid
    losses = [F.cross_entropy(each.movedim(-1, 1), targets, reduction="none") for each in logits]
    return torch.stack([loss.where(valid, 0.0).sum() / valid.sum().clamp(min=1) for loss in losses]).mean()
