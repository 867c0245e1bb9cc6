"""KAFEncoder: a backbone's stages, each followed by a KAFLayer (Section 3.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from torch import Tensor, nn

from kaf_layer.keypoints import Keypoints

__all__ = ["KAFEncoder", "KAFEncoderOutput"]


class KAFEncoderOutput(NamedTuple):
    """The map after each stage, fused where a layer follows it, and the tokens of each layer."""

    features: list[Annotated[Tensor, "B F *S"]]
    tokens: list[Annotated[Tensor, "B N E"]]


class KAFEncoder(nn.Module):
    """Runs stages in sequence, each on the fused features of the one before.

    Args:
        stages: modules from map to map. A stage that follows a layer takes its ``fused_channels``.
        layers: the layer that follows each stage, a [KAFLayer][kaf_layer.KAFLayer] or None.

    Raises:
        ValueError: if there are not as many layers as stages, or keypoints are missing.

    Example:
        >>> from kaf_layer import KAFLayer
        >>> stages = [torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)]
        >>> encoder = KAFEncoder(stages, [KAFLayer(8, depth=1), None])
        >>> keypoints = Keypoints(torch.rand(2, 5, 2) * 8, torch.ones(2, 5, dtype=torch.bool), (8, 12))
        >>> features, tokens = encoder(torch.rand(2, 1, 8, 12), keypoints)
        >>> [tuple(f.shape) for f in features], len(tokens)
        ([(2, 16, 8, 12), (2, 32, 4, 6)], 1)
    """

    def __init__(self, stages: Sequence[nn.Module], layers: Sequence[nn.Module | None]) -> None:
        super().__init__()
        if len(stages) != len(layers):
            raise ValueError(
                f"layers must have one entry for each stage, got {len(stages)} stages and {len(layers)} layers"
            )
        self.stages = nn.ModuleList(stages)
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers) if layer is not None})

    def forward(self, images: Annotated[Tensor, "B C *S"], keypoints: Keypoints | None = None) -> KAFEncoderOutput:
        """Computes the maps of all stages and the tokens of all layers.

        Args:
            images: (B, C, *S).
            keypoints: the keypoints of the images. An encoder without layers needs none.
        """
        if self.layers and keypoints is None:
            raise ValueError("an encoder with KAF layers needs keypoints, got keypoints=None")
        features, tokens, x = [], [], images
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if str(i) in self.layers:
                x, layer_tokens = self.layers[str(i)](x, keypoints)
                tokens.append(layer_tokens)
            features.append(x)
        return KAFEncoderOutput(features, tokens)
