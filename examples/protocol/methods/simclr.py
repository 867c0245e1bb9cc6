"""SimCLR (Chen et al., "A simple framework for contrastive learning of visual representations", 2020).

Its loss NT-Xent is our PCLLoss with only the views of the same slice as positives. In place of positions, the loss gets
the number of each slice divided by the number of slices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.protocol.methods.base import Pretraining, Slice, Slices, head, views
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation
from kaf_layer import Keypoints, PCLLoss


class InstanceContrast(nn.Module):
    """NT-Xent of two views (B, E) of slices with the given numbers (B,), over all processes."""

    def __init__(self, slices: int, *, temperature: float) -> None:
        super().__init__()
        self.slices = max(1, slices)
        self.loss = PCLLoss(temperature=temperature, threshold=0.5 / self.slices, gather_distributed=True)

    def forward(self, one: Tensor, other: Tensor, numbers: Tensor) -> Tensor:
        return self.loss(torch.stack([one, other], dim=1), numbers / self.slices)


class SimCLR(Pretraining):
    """Two views of each slice must find each other among all views of the batch, over all processes."""

    def __init__(self, network: nn.Module, samples: Sequence[Slice], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        self.projector = head(self.channels, self.embed_dim, self.embed_dim)
        self.contrast = InstanceContrast(len(samples), temperature=options.temperature)

    def draw(self, batch: Slices, augment: Augmentation) -> tuple[Any, ...]:
        return *views(batch, augment, count=2), batch.numbers

    def forward(self, images: Tensor, keypoints: Keypoints, numbers: Tensor) -> dict[str, Tensor]:
        one, other = self.projector(self.embed(images, keypoints)).chunk(2)
        return {"loss": self.contrast(one, other, numbers)}
