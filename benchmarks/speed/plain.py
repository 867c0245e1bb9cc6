"""The paper's layer in plain PyTorch, the baseline of layers.py, from its description and its authors' design.

Attention runs on two copies of the tokens, as in that design's matching network. The diffusion runs over every pixel.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from kaf_layer import Keypoints


class PlainDiffusion(nn.Module):
    """Puts tokens into a zero map, then applies convolution, batch normalisation, ReLU and convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, *, hidden_channels: int = 64, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if spatial_dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.conv1 = convolution(in_channels, hidden_channels, 3, padding=1)
        self.norm = norm(hidden_channels)
        self.conv2 = convolution(hidden_channels, out_channels, 3, padding=1)

    def forward(self, tokens: Tensor, keypoints: Keypoints, size: tuple[int, ...]) -> Tensor:
        batch, _, channels = tokens.shape
        index = keypoints.cells(size)[:, None].expand(-1, channels, -1)
        sparse_map = tokens.new_zeros(batch, channels, prod(size)).scatter(2, index, tokens.mT)
        hidden = self.conv1(sparse_map.view(batch, channels, *size))
        return self.conv2(torch.relu(self.norm(hidden)))


class PlainBlock(nn.Module):
    """The block of SuperGlue (Sarlin et al., 2020, Eq. 3) on channels x tokens."""

    def __init__(self, embed_dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.merge = (nn.Conv1d(embed_dim, embed_dim, 1) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Conv1d(2 * embed_dim, 2 * embed_dim, 1),
            nn.BatchNorm1d(2 * embed_dim),
            nn.ReLU(),
            nn.Conv1d(2 * embed_dim, embed_dim, 1),
        )

    def forward(self, tokens: Tensor, source: Tensor) -> Tensor:
        batch, channels, _ = tokens.shape
        query, key, value = (
            projection(x).view(batch, channels // self.num_heads, self.num_heads, -1)
            for projection, x in ((self.query, tokens), (self.key, source), (self.value, source))
        )
        scores = torch.einsum("bdhn,bdhm->bhnm", query, key) / query.shape[1] ** 0.5
        attended = torch.einsum("bhnm,bdhm->bdhn", scores.softmax(dim=-1), value)
        message = self.merge(attended.reshape(batch, channels, -1))
        return self.mlp(torch.cat([tokens, message], dim=1))


class PlainKAFLayer(nn.Module):
    """Samples, applies ``depth`` blocks to each of two copies of the tokens, diffuses and concatenates."""

    def __init__(self, in_channels: int, *, depth: int, embed_dim: int = 256, num_heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv1d(in_channels, embed_dim, 1)
        sizes = (2, 32, 64, 128, 256, embed_dim)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Conv1d(before, after, 1), nn.BatchNorm1d(after), nn.ReLU()]
        self.position_encoder = nn.Sequential(*layers[:-2])
        self.blocks = nn.ModuleList(PlainBlock(embed_dim, num_heads=num_heads) for _ in range(depth))
        self.diffusion = PlainDiffusion(embed_dim, in_channels)

    def forward(self, features: Tensor, keypoints: Keypoints) -> Tensor:
        size = features.shape[2:]
        index = keypoints.cells(size)[:, None].expand(-1, features.shape[1], -1)
        positions = keypoints.positions_in(size) / (0.7 * max(size))
        tokens = self.embed(features.flatten(2).gather(2, index)) + self.position_encoder(positions.mT)
        twin = tokens
        for block in self.blocks:
            tokens, twin = tokens + block(tokens, twin), twin + block(twin, tokens)
        return torch.cat([features, self.diffusion(tokens.mT, keypoints, size)], dim=1)
