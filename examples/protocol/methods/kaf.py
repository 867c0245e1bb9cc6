"""The paper's pretraining, which is all of Eq. 3, and PCL (Zeng et al. 2021), which is its first part alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.protocol.methods.base import Pretraining
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.batches import collate
from examples.protocol.volumes.stacks import Stack, match_slices, say, stack_matches
from kaf_layer import KAFPretrainingLoss, Keypoints, Matches

Pair = tuple[Stack, int, int, Matches]  # a volume, the numbers of two slices, and the matches of their keypoints


class Pairs(NamedTuple):
    """A batch of pairs of slices: the first of each pair, then the second of each."""

    images: Tensor  # 2B 1 H W
    keypoints: Keypoints
    positions: Tensor  # (2B,), relative
    matches: Matches


class KAF(Pretraining):
    """Learns from pairs of neighbouring slices. A network without tokens learns by the positional contrast alone."""

    def __init__(self, network: nn.Module, samples: Sequence[Pair], options: PretrainOptions) -> None:
        super().__init__(network, samples, options)
        tokens = (
            options.embed_dim * len(cast("nn.ModuleList", self.encoder.layers))
            if options.model.startswith("kaf")
            else 0
        )
        self.loss = KAFPretrainingLoss(
            self.channels,
            tokens,
            embed_dim=options.embed_dim,
            weights=options.weights if tokens else (1.0, 0.0, 0.0),
            temperature=options.temperature,
            threshold=options.threshold,
            gather_distributed=True,
        )

    @staticmethod
    def samples(stacks: Sequence[Stack], options: PretrainOptions) -> list[Pair]:
        """Pairs of each slice with the next one. If a volume has only one slice, it is paired with itself."""
        pairs = []
        for stack in tqdm(stacks, desc="matches", leave=False):
            if len(stack.images) == 1:
                say(stack, "a slice without a neighbour is paired with itself")
            for z in range(max(1, len(stack.images) - 1)):
                following = min(z + 1, len(stack.images) - 1)
                both = stack.keypoints[z], stack.keypoints[following]
                pairs.append((stack, z, following, match_slices(*both, max_distance=options.max_distance)))
        return pairs

    @staticmethod
    def batch_of(samples: Sequence[Pair]) -> Pairs:
        slices = [(stack, a) for stack, a, _, _ in samples] + [(stack, b) for stack, _, b, _ in samples]
        images, keypoints, _ = collate(slices)
        positions = torch.stack([stack.positions[z] for stack, z in slices])
        matches = stack_matches([matches for *_, matches in samples], keypoints.valid.shape[1])
        return Pairs(images, keypoints, positions, matches)

    def draw(self, batch: Pairs, augment: Augmentation) -> tuple[Any, ...]:
        images, keypoints, _ = augment(batch.images, batch.keypoints)
        half = len(images) // 2
        return images, keypoints, batch.positions, batch.matches.among(keypoints[:half], keypoints[half:])

    def forward(self, images: Tensor, keypoints: Keypoints, positions: Tensor, matches: Matches) -> dict[str, Tensor]:
        features, tokens = self.encoder(images, keypoints)
        total, *others = losses = self.loss(features[-1], positions, tokens, keypoints, matches)
        return {"loss": total, **dict(zip(losses._fields[1:], others, strict=True))}


class PCL(KAF):
    """The contrast of slices by their positions, alone."""
