"""KAFPretrainingLoss: the paper's pretraining loss, from an encoder's maps and tokens to a scalar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.types import Device

from kaf_layer.checks import check_counts, check_floats, check_keypoints, check_precision
from kaf_layer.keypoints import Keypoints
from kaf_layer.losses.keypoint_match import KeypointMatchLoss
from kaf_layer.losses.pcl import PCLLoss
from kaf_layer.matching import Matches
from kaf_layer.matching.correspondence import check_matches

__all__ = ["KAFPretrainingLoss", "PretrainingLosses"]


class PretrainingLosses(NamedTuple):
    """The weighted total, to train with, and its parts before weighting, for logs. Parts left out are zero."""

    total: Annotated[Tensor, ""]
    bottleneck: Annotated[Tensor, ""]
    keypoints: Annotated[Tensor, ""]
    matching: Annotated[Tensor, ""]


class KAFPretrainingLoss(nn.Module):
    """The pretraining loss (Yang et al., NeurIPS 2023, Eq. 3), with the heads that it needs.

    It is the weighted sum of three parts:

    1. bottleneck: [PCLLoss][kaf_layer.PCLLoss] of the encoder's last map, averaged over its pixels and projected.
    2. keypoints: [PCLLoss][kaf_layer.PCLLoss] of the tokens. Those of all scales are concatenated, pass an MLP, and are
       averaged over the valid keypoints. An image without keypoints has a zero embedding, which is similar to nothing.
    3. matching: [KeypointMatchLoss][kaf_layer.KeypointMatchLoss] of the same tokens after the MLP, before they are
       averaged.

    All are zero for an empty batch. The images come in pairs: image i of the first half of the batch and image i of
    the second half are slices at similar positions, usually neighbours in one volume, each with its own augmentation.

    Args:
        bottleneck_channels: C, the channels of the encoder's last map.
        token_channels: the channels of the tokens of all scales together; 0 for an encoder without KAF layers.
        embed_dim: E, the channels of embeddings and of the matcher's tokens.
        weights: the weights of the three parts. A part of weight zero has no parameters and is not computed.
        temperature: the temperature of the contrasts, > 0.
        threshold: the difference of positions below which slices are positives, > 0.
        gather_distributed: contrasts with the embeddings of all processes.
        batch_norm: whether the projection of the last map begins with a batch norm. False is the paper's projection.
            The averages of an untrained encoder are nearly parallel. Without a batch norm the contrast may push them
            together until it has no gradient, and its loss stays at the logarithm of the number of other images. With
            several processes use ``nn.SyncBatchNorm.convert_sync_batchnorm``.
        matcher_depth: the matcher's number of attention blocks.
        num_heads: the number of attention heads; divides ``embed_dim``.
        iterations: the iterations of the matcher's Sinkhorn algorithm.
        spatial_dims: the number of coordinates of a keypoint's position.
        device: where the weights are made; torch's default if None.
        dtype: the type of the weights; torch's default if None.

    Shape:
        - bottleneck: (2 B, C, *S).
        - positions: (2 B,), the slices' relative positions in their volumes, from 0 to 1.
        - tokens: (2 B, N, E_i) for each scale, as [KAFEncoder][kaf_layer.KAFEncoder] gives.
        - keypoints: the keypoints of all 2 B images.
        - matches: from the first half's keypoints to the second half's, B samples.
        - result: [PretrainingLosses][kaf_layer.PretrainingLosses].

    Raises:
        TypeError: if an input that a part needs has another type.
        ValueError: if an input that a part needs is missing or does not fit, positions are outside [0, 1], or
            weights are negative or all zero. For positions on an accelerator see [PCLLoss][kaf_layer.PCLLoss].

    Example:
        >>> keypoints = Keypoints(torch.rand(4, 5, 2) * 8, torch.ones(4, 5, dtype=torch.bool), (8, 12))
        >>> tokens = [torch.rand(4, 5, 32), torch.rand(4, 5, 32)]
        >>> matches = Matches(torch.tensor([[1, -1, 0, -1, -1]] * 2), torch.tensor([[2, 0, -1, -1, -1]] * 2))
        >>> loss = KAFPretrainingLoss(16, 64, embed_dim=32)
        >>> losses = loss(torch.rand(4, 16, 2, 3), torch.rand(4), tokens, keypoints, matches)
        >>> losses.total.shape, losses._fields
        (torch.Size([]), ('total', 'bottleneck', 'keypoints', 'matching'))
    """

    def __init__(
        self,
        bottleneck_channels: int,
        token_channels: int = 0,
        *,
        embed_dim: int = 256,
        weights: tuple[float, float, float] = (1.0, 1.0, 0.01),
        temperature: float = 0.1,
        threshold: float = 0.1,
        gather_distributed: bool = False,
        batch_norm: bool = True,
        matcher_depth: int = 4,
        num_heads: int = 4,
        iterations: int = 100,
        spatial_dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(weights) != 3 or min(weights) < 0 or not any(weights):
            raise ValueError(f"weights must be three numbers, none negative and not all zero, got {weights=}")
        if any(weights[1:]) and token_channels < 1:
            raise ValueError(
                f"token_channels must be 1 or more for the parts on keypoints (else weigh them 0), "
                f"got {token_channels=} and {weights=}"
            )
        check_counts(bottleneck_channels=bottleneck_channels, embed_dim=embed_dim)
        self.weights = weights
        self.contrast = PCLLoss(temperature=temperature, threshold=threshold, gather_distributed=gather_distributed)
        self.norm = nn.BatchNorm1d(bottleneck_channels, **factory) if weights[0] and batch_norm else None
        self.projector = _mlp(bottleneck_channels, embed_dim, **factory) if weights[0] else None
        self.token_mlp = _mlp(token_channels, embed_dim, **factory) if any(weights[1:]) else None
        self.match = (
            KeypointMatchLoss(
                embed_dim,
                depth=matcher_depth,
                num_heads=num_heads,
                iterations=iterations,
                spatial_dims=spatial_dims,
                **factory,
            )
            if weights[2]
            else None
        )

    def forward(
        self,
        bottleneck: Annotated[Tensor, "2B C *S"],
        positions: Annotated[Tensor, "2B"],
        tokens: Sequence[Annotated[Tensor, "2B N E_i"]] | Annotated[Tensor, "2B N E"] = (),
        keypoints: Keypoints | None = None,
        matches: Matches | None = None,
    ) -> PretrainingLosses:
        """Computes the total and its parts. Inputs that only a part of weight zero needs may be left out.

        Args:
            bottleneck: (2 B, C, *S), the encoder's last map.
            positions: (2 B,), the slices' relative positions in their volumes, from 0 to 1.
            tokens: (2 B, N, E_i) for each scale.
            keypoints: the keypoints of all 2 B images.
            matches: from the first half's keypoints to the second half's.
        """
        check_floats(bottleneck=bottleneck)
        tokens = [tokens] if isinstance(tokens, Tensor) else tokens
        parts = [torch.zeros((), device=bottleneck.device)] * 3
        if self.projector is not None:
            pooled = _pooled(bottleneck, self.projector)
            # Fewer than two images have no statistics; the contrast refuses one.
            pooled = pooled if self.norm is None or len(pooled) < 2 else self.norm(pooled)
            embeddings = self.projector(pooled)
            parts[0] = self.contrast(embeddings[:, None], positions)
        if self.token_mlp is not None:
            if keypoints is None or not tokens:
                raise ValueError(
                    "tokens and keypoints must be given for the parts on keypoints (else weigh them 0), got none"
                )
            features = self.token_mlp(_merged(tokens, keypoints, self.token_mlp))
            if self.weights[1]:
                parts[1] = self.contrast(_masked_mean(features, keypoints)[:, None], positions)
            if self.match is not None:
                parts[2] = self.match(*_halves(features, keypoints, matches))
        # Parts of weight zero stay out, since 0 * NaN would be NaN.
        total = torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True) if weight]).sum()
        return PretrainingLosses(total, *(part.detach() for part in parts))

    def extra_repr(self) -> str:
        """The options that its parts do not show."""
        return f"weights={self.weights}"


def _mlp(in_channels: int, embed_dim: int, **factory: Any) -> nn.Sequential:
    first, last = nn.Linear(in_channels, embed_dim, **factory), nn.Linear(embed_dim, embed_dim, **factory)
    return nn.Sequential(first, nn.ReLU(), last)


def _pooled(bottleneck: Annotated[Tensor, "2B C *S"], projector: nn.Sequential) -> Annotated[Tensor, "2B C"]:
    weight = next(projector.parameters())
    check_precision(projector, bottleneck=bottleneck)
    channels = weight.shape[1]
    if bottleneck.ndim < 3 or bottleneck.shape[1] != channels:
        raise ValueError(f"bottleneck must be (2 B, C, *S) with {channels} channels, got {bottleneck.shape=}")
    return bottleneck.flatten(2).mean(dim=2)


def _merged(
    tokens: Sequence[Annotated[Tensor, "2B N E_i"]], keypoints: Keypoints, token_mlp: nn.Sequential
) -> Annotated[Tensor, "2B N E"]:
    """The tokens of all scales, concatenated, and zero in slots that are not valid."""
    check_keypoints(keypoints=keypoints)
    weight = next(token_mlp.parameters())
    for scale in tokens:
        check_precision(token_mlp, tokens=scale)
    shapes, channels = [tuple(scale.shape) for scale in tokens], weight.shape[1]
    if any(shape[:-1] != keypoints.valid.shape for shape in shapes) or sum(shape[-1] for shape in shapes) != channels:
        raise ValueError(
            f"tokens must be (2 B, N, E_i), one for each keypoint, with {channels} channels together, "
            f"got {shapes} for {keypoints.valid.shape=}"
        )
    return torch.cat(list(tokens), dim=-1).masked_fill(~keypoints.valid[..., None], 0.0)


def _masked_mean(tokens: Annotated[Tensor, "B N E"], keypoints: Keypoints) -> Annotated[Tensor, "B E"]:
    valid = keypoints.valid[..., None]
    return tokens.masked_fill(~valid, 0.0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def _halves(
    features: Annotated[Tensor, "2B N E"], keypoints: Keypoints, matches: Matches | None
) -> tuple[Tensor, Keypoints, Tensor, Keypoints, Matches]:
    if matches is not None:
        check_matches(matches)
    if matches is None or len(features) != 2 * len(matches.indices):
        samples = None if matches is None else len(matches.indices)
        raise ValueError(
            "matches must be given for the matching (else weigh it 0), of half as many samples as there are images, "
            f"got {samples} samples for {len(features)} images"
        )
    half = len(features) // 2
    return features[:half], keypoints[:half], features[half:], keypoints[half:], matches
