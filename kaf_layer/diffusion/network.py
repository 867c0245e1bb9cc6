"""Tokens to a dense feature map: the diffusion network, for the price of its keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaf_layer.checks import check_counts, check_floats, check_tokens
from kaf_layer.diffusion.background import border_matrix
from kaf_layer.diffusion.karatsuba import karatsuba_matrices
from kaf_layer.diffusion.neighbours import closest, find_neighbours, find_rows, padded_neighbours
from kaf_layer.diffusion.patches import memory_format, rows_to_map
from kaf_layer.diffusion.pixels import normalise_and_convolve
from kaf_layer.diffusion.rows import Hidden, Tokens, convolve_tokens, convolve_tokens_to_map, normalisation, wide
from kaf_layer.keypoints import Keypoints, check_size
from kaf_layer.scattering import Reduce, cell_shares, check_reduce, scatter_keypoints

__all__ = ["KeypointDiffusion", "cheapest_method"]

Method = Literal["rows", "hybrid", "dense"]


def cheapest_method(slots: int, size: Sequence[int]) -> Method:
    """How the diffusion network is computed: by a rule on shapes only. The results are the same.

    - ``"rows"``: both convolutions where the keypoints are, while their 3x3 neighbourhoods
      could cover no more than a third of the map.
    - ``"hybrid"``: only the first one, while there are at most half as many slots as pixels.
    - ``"dense"``: neither.

    A graph for ``torch.export`` always holds ``"rows"``, which fits all shapes; one for ONNX ``"dense"``, which
    any runtime can do.

    Args:
        slots: of each sample, N.
        size: the map's size.

    Example:
        >>> [cheapest_method(512, (edge, edge)) for edge in (512, 64, 16)]
        ['rows', 'hybrid', 'dense']
    """
    if torch.onnx.is_in_onnx_export():
        return "dense"
    if torch.compiler.is_exporting() or 3 * 3 ** len(size) * slots <= prod(size):
        return "rows"
    return "hybrid" if 2 * slots <= prod(size) else "dense"


class _Fusion(NamedTuple):
    """How the map is to join features: behind those ``before`` it, or times a ``gain``, to be added to them."""

    before: Tensor | None
    layout: torch.memory_format
    gain: Tensor | None


class KeypointDiffusion(nn.Module):
    """Spreads tokens over a feature map: convolution, batch normalisation, ReLU, convolution (Section 3.1).

    Its input is a map that is zero except at the keypoints' cells. Away from them the result is
    constant, and nothing is computed. :func:`cheapest_method` chooses how; set the attribute
    ``method`` to choose yourself. Replace ``norm`` by a module of another type, or by one
    without running averages, and the computation becomes dense.

    Args:
        in_channels: of a token.
        out_channels: of the map.
        hidden_channels: between the two convolutions.
        reduce: what becomes of keypoints in one cell, ``"mean"``, ``"sum"`` or ``"amax"``.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: if ``reduce`` or ``spatial_dims`` is none of these.

    Example:
        >>> kp = Keypoints(torch.rand(2, 5, 2) * 32, torch.ones(2, 5).bool(), (32, 48))
        >>> diffusion = KeypointDiffusion(256, 16)
        >>> diffusion(torch.randn(2, 5, 256), kp, (16, 24)).shape
        torch.Size([2, 16, 16, 24])
        >>> diffusion(torch.randn(2, 5, 256), kp, (16, 24), features=torch.randn(2, 8, 16, 24)).shape
        torch.Size([2, 24, 16, 24])
        >>> features, gain = torch.randn(2, 16, 16, 24), torch.zeros(16)
        >>> torch.equal(diffusion(torch.randn(2, 5, 256), kp, (16, 24), features=features, gain=gain), features)
        True
    """

    before: Tensor
    after: Tensor
    borders: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 64,
        reduce: Reduce = "mean",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims=}")
        check_counts(in_channels=in_channels, out_channels=out_channels, hidden_channels=hidden_channels)
        check_reduce(reduce)
        conv: Any = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        norm: Any = nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d
        self.reduce: Reduce = reduce
        self.method: Method | None = None
        self.conv1 = conv(in_channels, hidden_channels, 3, padding=1)
        self.norm = norm(hidden_channels)
        self.conv2 = conv(hidden_channels, out_channels, 3, padding=1)
        before, after = karatsuba_matrices(spatial_dims)
        self.register_buffer("before", before, persistent=False)
        self.register_buffer("after", after, persistent=False)
        self.register_buffer("borders", border_matrix(spatial_dims), persistent=False)

    def forward(
        self,
        tokens: Annotated[Tensor, "B N C"],
        keypoints: Keypoints,
        size: Sequence[int],
        *,
        features: Annotated[Tensor, "B F *S"] | None = None,
        gain: Annotated[Tensor, "out"] | None = None,
    ) -> Annotated[Tensor, "B F+out *S"]:
        """Tokens to a map of the given size.

        Args:
            tokens: one per slot. Slots that are not valid may hold anything.
            keypoints: where the tokens belong.
            size: the map's size in tensor order.
            features: a map to put before the result's channels, as in fusion by concatenation;
                cheaper than ``torch.cat``, which would copy the result.
            gain: a factor for each channel. With it the result is added to the features, not put behind them;
                cheaper than to add it afterwards, as no map is kept for the backward pass.

        Raises:
            TypeError: if an argument is of another type.
            ValueError: if the shapes do not fit, the tokens have not the weights' type, or a gain has no features.
        """
        check_tokens(tokens, keypoints, weight=self.conv1.weight)
        check_size(size, keypoints)
        if features is not None:
            check_floats(features=features)
            if features.shape[0] != tokens.shape[0] or features.shape[2:] != tuple(size):
                raise ValueError(f"features must be (B, F, *size), got {features.shape=}, {tokens.shape=} and {size=}")
        if gain is not None:
            check_floats(gain=gain)
            channels, needed = None if features is None else features.shape[1], self.conv2.out_channels
            if (channels, *gain.shape) != (needed, needed):
                got = f"got {gain.shape=} and features of {channels} channels"
                raise ValueError(f"with a gain, features must have {needed} channels, and gain as many numbers, {got}")
        needs_pixels = self.norm.training and isinstance(self.norm, (nn.BatchNorm2d, nn.BatchNorm3d))
        if needs_pixels and tokens.shape[0] * prod(size) == 1:
            raise ValueError(
                f"batch statistics need more than one pixel, got {tokens.shape=} and {size=}; call .eval()"
            )
        fusion = _Fusion(features if gain is None else None, memory_format(features), gain)
        diffused = self._diffuse(tokens, keypoints, size, fusion)
        return diffused if gain is None or features is None else _add(diffused, features)

    def _diffuse(self, tokens: Tensor, keypoints: Keypoints, size: Sequence[int], fusion: _Fusion) -> Tensor:
        method = self.method or cheapest_method(tokens.shape[1], size)
        # An empty batch has no statistics, which torch's own modules know.
        if method == "dense" or tokens.shape[0] == 0 or not _has_running_average(self.norm):
            return self._dense(tokens, keypoints, size, fusion)
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        with torch.autocast(device, enabled=False):
            cells = keypoints.cells(size)
            shares = cell_shares(tokens, keypoints, cells, size, reduce=self.reduce)
            valid = keypoints.valid.flatten() if keypoints.padded else None
            weighted = Tokens(tokens.flatten(0, 1).to(dtype), valid, shares.flatten(0, 1))
            return (self._hybrid if method == "hybrid" else self._rows)(weighted, cells, size, fusion)

    def _dense(self, tokens: Tensor, keypoints: Keypoints, size: Sequence[int], fusion: _Fusion) -> Tensor:
        sparse = scatter_keypoints(tokens, keypoints, size, reduce=self.reduce).contiguous(memory_format=fusion.layout)
        diffused = self.conv2(F.relu(self.norm(self.conv1(sparse))))
        if fusion.gain is not None:
            diffused = diffused * fusion.gain.to(diffused.dtype).view(-1, *[1] * len(size))
        return _concatenate(fusion.before, diffused)

    def _hybrid(self, tokens: Tokens, cells: Tensor, size: Sequence[int], fusion: _Fusion) -> Tensor:
        batch, near = cells.shape[0], padded_neighbours(cells, size)
        pixels = convolve_tokens_to_map(tokens, self.conv1.weight, near, batch=batch, size=size)
        second = self._second(fusion.gain)
        diffused, mean, inverse_std = normalise_and_convolve(pixels, self.conv1.bias, self.norm, *second)
        if self.norm.training:
            var = inverse_std.pow(-2) - self.norm.eps
            self._track(mean + self.conv1.bias, var, pixels=batch * prod(size))
        return _concatenate(fusion.before, diffused.contiguous(memory_format=fusion.layout))

    def _rows(self, tokens: Tokens, cells: Tensor, size: Sequence[int], fusion: _Fusion) -> Tensor:
        near = find_neighbours(cells, size, radius=2)
        index = find_rows(*closest(*near), size)
        rows = convolve_tokens(tokens, self.conv1.weight, index, count=index.numel())
        scale, shift = self._normalisation(rows, pixels=cells.shape[0] * prod(size))
        hidden = Hidden(rows, scale, shift, *self._second(fusion.gain))
        return rows_to_map(hidden, fusion.before, near, (self.before, self.after, self.borders), size, fusion.layout)

    def _second(self, gain: Tensor | None) -> tuple[Tensor, Tensor]:
        """The second convolution's weight and bias, multiplied by the gain so that no map needs to be."""
        weight, bias = self.conv2.weight, self.conv2.bias
        if gain is None:
            return weight, bias
        gain = gain.to(weight.dtype)
        return weight * gain.view(-1, *[1] * (weight.ndim - 1)), bias * gain

    def _normalisation(self, rows: Tensor, *, pixels: int) -> tuple[Tensor, Tensor]:
        """Batch normalisation as a factor and a summand, for rows that lack the first convolution's bias."""
        norm, bias = self.norm, self.conv1.bias
        if norm.training:
            parameters = bias, norm.weight, norm.bias
            scale, shift, mean, var = normalisation(rows, *parameters, pixels=pixels, eps=norm.eps)
            self._track(mean, var, pixels=pixels)
            return scale, shift
        mean, var = norm.running_mean.to(wide(rows)), norm.running_var.to(wide(rows))
        scale = norm.weight * torch.rsqrt(var + norm.eps)
        return scale, torch.addcmul(norm.bias, bias - mean, scale)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, *, pixels: int) -> None:
        """Moves the running averages towards a batch's mean and biased variance."""
        norm = self.norm
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((var * (pixels / (pixels - 1))).to(norm.running_var.dtype), norm.momentum)
        norm.num_batches_tracked.add_(1)


def _has_running_average(norm: Any) -> bool:
    plain = type(norm) in (nn.BatchNorm2d, nn.BatchNorm3d)
    return plain and norm.affine and norm.track_running_stats and norm.momentum is not None


def _concatenate(
    before: Annotated[Tensor, "B F *S"] | None, diffused: Annotated[Tensor, "B O *S"]
) -> Annotated[Tensor, "B F+O *S"]:
    return diffused if before is None else torch.cat([before, diffused], dim=1)


def _add(diffused: Annotated[Tensor, "B O *S"], features: Annotated[Tensor, "B O *S"]) -> Annotated[Tensor, "B O *S"]:
    if torch.promote_types(features.dtype, diffused.dtype) != diffused.dtype:
        return features + diffused
    return diffused.add_(features)  # in place, as the system takes longer to find memory for a map than to add two
