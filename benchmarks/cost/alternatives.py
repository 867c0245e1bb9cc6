"""Counts what one layer of long-range attention costs: KAF layers and their alternatives on the same feature map.

python -m benchmarks.cost.alternatives  # half a minute, 2 GB of memory

Each row is one layer on a map of 256 channels at stride 8, as in a UNet of width 32. Layers of other papers are
written from their equations: the non-local block (Wang et al., 2018, Section 3, embedded Gaussian), deformable
attention (Zhu et al., 2021, Eq. 2), and the point head of PointRend (Kirillov et al., 2020, Section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import harness
from benchmarks.common.measuring import count_flops, saved_bytes
from kaf_layer import GridDetector, KAFLayer, Keypoints, KeypointTransformer, sample_keypoints

CHANNELS, STRIDE, POINTS = 256, 8, 500
EDGES = (256, 512, 1024)


class NonLocal(nn.Module):
    """Each cell of the map attends to all cells, or to maxima over ``pool`` x ``pool`` cells."""

    def __init__(self, channels: int, *, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.out = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor, _keypoints: Keypoints) -> Tensor:
        pooled = F.max_pool2d(x, self.pool)
        maps = self.query(x), self.key(pooled), self.value(pooled)
        query, key, value = (part.flatten(2).mT[:, None].contiguous() for part in maps)  # one head
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0]
        return x + self.out(attended.mT.unflatten(2, x.shape[2:]))


class Deformable(nn.Module):
    """Each cell samples the map at a few places near it, which it predicts."""

    def __init__(self, channels: int, *, heads: int = 8, points: int = 4) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.value, self.out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.offsets = nn.Conv2d(channels, 2 * heads * points, 1)
        self.weights = nn.Conv2d(channels, heads * points, 1)

    def forward(self, x: Tensor, _keypoints: Keypoints) -> Tensor:
        size = x.shape[2:]
        value = self.value(x).unflatten(1, (self.heads, -1)).flatten(0, 1)
        cells = F.affine_grid(torch.eye(2, 3, device=x.device)[None], [1, 1, *size], align_corners=False)
        offsets = self.offsets(x).unflatten(1, (self.heads, self.points, 2)).flatten(0, 1).movedim(2, -1)
        weights = self.weights(x).unflatten(1, (self.heads, self.points)).softmax(2).flatten(0, 1)
        places = (cells[:, None] + offsets).flatten(1, 2)
        sampled = F.grid_sample(value, places, align_corners=False).unflatten(2, (self.points, size[0]))
        mixed = (sampled * weights[:, None]).sum(2)
        return x + self.out(mixed.unflatten(0, (-1, self.heads)).flatten(1, 2))


class StridedAttention(nn.Module):
    """The map's cells, averaged to a coarser stride, attend to each other in Transformer blocks."""

    def __init__(self, channels: int, *, factor: int, depth: int) -> None:
        super().__init__()
        self.factor = factor
        self.transformer = KeypointTransformer(channels, depth=depth)

    def forward(self, x: Tensor, _keypoints: Keypoints) -> Tensor:
        coarse = F.avg_pool2d(x, self.factor)
        tokens = self.transformer(coarse.flatten(2).mT, GridDetector(1)(coarse))
        return x + F.interpolate(tokens.mT.unflatten(2, coarse.shape[2:]), x.shape[2:])


class PointHead(nn.Module):
    """Predicts each point's class from the features at that point. Points do not see each other."""

    def __init__(self, channels: int, *, classes: int = 4) -> None:
        super().__init__()
        widths = [channels, 256, 256, 256]
        hidden = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.head = nn.Sequential(*hidden, nn.Linear(256, classes))

    def forward(self, x: Tensor, keypoints: Keypoints) -> Tensor:
        return self.head(sample_keypoints(x, keypoints))


LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "KAF layer": ("500 keypoints", lambda: KAFLayer(CHANNELS, depth=6, fusion="add")),
    "KAF layer, small": ("500 keypoints", lambda: KAFLayer(CHANNELS, embed_dim=64, depth=2, fusion="add")),
    "non-local block": ("all cells", lambda: NonLocal(CHANNELS)),
    "non-local block, keys pooled": ("all cells", lambda: NonLocal(CHANNELS, pool=2)),
    "global attention at stride 16": ("cells of 16x16 pixels", lambda: StridedAttention(CHANNELS, factor=2, depth=6)),
    "global attention at stride 32": ("cells of 32x32 pixels", lambda: StridedAttention(CHANNELS, factor=4, depth=6)),
    "deformable attention": ("32 places for each cell", lambda: Deformable(CHANNELS)),
    "PointRend's point head": ("500 points", lambda: PointHead(CHANNELS)),
}
NOTES = f"""GFLOPs of the forward pass of one layer in training mode, and the MB (10^6 bytes, float32) that it saves for
the backward pass. Its input is one map of {CHANNELS} channels at stride {STRIDE} of an image of edge x edge pixels. A
multiply-add is 2 FLOPs. Sampling, softmax and normalisation are not counted. KAF layers have {POINTS} keypoints.
Transformers have 6 blocks and 256 channels; the small KAF layer has 2 blocks and 64 channels. Attention saves no matrix
of weights."""


def measure(build: Callable[[], nn.Module], edge: int) -> tuple[float, float]:
    """Returns GFLOPs and saved MB."""
    layer, x = build(), torch.zeros(1, CHANNELS, edge // STRIDE, edge // STRIDE, requires_grad=True)
    side = math.ceil(POINTS**0.5)
    keypoints = GridDetector(edge / side)(torch.zeros(1, 1, edge, edge))
    keypoints = keypoints[:, :POINTS]
    saved = saved_bytes(lambda: layer(x, keypoints), aside=[x])
    return count_flops(lambda: layer(x, keypoints)) / 1e9, saved / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    harness.parser(__doc__).parse_args(arguments)
    rows: list[dict[str, object]] = []
    for name, (attends, build) in LAYERS.items():
        row: dict[str, object] = {"layer": name, "parameters, M": sum(p.numel() for p in build().parameters()) / 1e6}
        row["attends to"] = attends
        counts = {edge: measure(build, edge) for edge in EDGES}
        row |= {f"GFLOPs, {edge}": flops for edge, (flops, _) in counts.items()}
        row |= {f"saved MB, {edge}": saved for edge, (_, saved) in counts.items()}
        rows.append(row)
    harness.report("alternatives", rows, notes=NOTES, measured=False)


if __name__ == "__main__":
    main()
