"""The diffusion network: tokens to a dense feature map, at a cost set by the number of keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.types import Device

from kaf_layer.checks import check_counts, check_floats, check_precision, check_tokens
from kaf_layer.diffusion.sparse import (
    closest,
    convolve_constant,
    convolve_deviations,
    convolve_tokens,
    find_neighbours,
    find_rows,
)
from kaf_layer.keypoints import Keypoints, check_size
from kaf_layer.normalization import is_synchronised, normalise_rows
from kaf_layer.precision import at_least_float32, product_dtype, without_autocast
from kaf_layer.scattering import Reduce, cell_shares, check_reduce, scatter_keypoints

__all__ = ["KeypointDiffusion", "cheapest_method"]

Method = Literal["rows", "hybrid", "dense"]


def cheapest_method(
    slots: int, size: Sequence[int], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Method:
    """Chooses how to compute the diffusion network, by a rule on shapes, device and type. The results are the same.

    - ``"rows"`` computes both convolutions around the keypoints only, if their 3x3 neighbourhoods
      could cover no more than a third of the map.
    - ``"hybrid"`` does so for the first convolution, if there are at most half as many slots as pixels.
    - ``"dense"`` computes both on the whole map.

    On an accelerator dense convolutions in half precision are an order of magnitude faster than in single precision,
    and sums into rows are not. There the limits are a sixth of the map, and a 16th as many slots as pixels. These are
    estimates from counted bytes and FLOPs (``benchmarks/cost/roofline.py``), not from measured times.

    A graph for ``torch.export`` always holds ``"rows"``, which fits all shapes. A graph for ONNX holds ``"dense"``,
    which every runtime supports.

    Args:
        slots: N, the number of slots of each sample.
        size: the map's size in tensor order.
        device: where it is computed.
        dtype: of matrix products.

    Example:
        >>> [cheapest_method(512, (edge, edge)) for edge in (512, 64, 16)]
        ['rows', 'hybrid', 'dense']
        >>> [cheapest_method(512, (edge, edge), device="cuda", dtype=torch.bfloat16) for edge in (512, 128, 64)]
        ['rows', 'hybrid', 'dense']
    """
    if torch.onnx.is_in_onnx_export():
        return "dense"
    has_fast_convolutions = torch.device(device).type != "cpu" and dtype in (torch.float16, torch.bfloat16)
    cover, pixels = (6, 16) if has_fast_convolutions else (3, 2)
    if torch.compiler.is_exporting() or cover * 3 ** len(size) * slots <= prod(size):
        return "rows"
    return "hybrid" if pixels * slots <= prod(size) else "dense"


class KeypointDiffusion(nn.Module):
    """Spreads tokens over a feature map: convolution, batch normalisation, ReLU, convolution (Section 3.1).

    Its input is a map that is zero except at the keypoints' cells. Away from them the result is
    constant, and nothing is computed. [cheapest_method][kaf_layer.diffusion.network.cheapest_method] chooses the
    method. Set the attribute ``method`` to choose it yourself.

    A step is computed around the keypoints only if its result is known to be that of the module: ``conv1`` and
    ``conv2`` are torch's convolutions as they were made here (parametrizations, such as
    ``torch.nn.utils.parametrizations.weight_norm``, are fine), ``norm`` is a batch norm, plain or synchronised, with
    weights and running statistics, and none of them has hooks. Otherwise the module is called on the whole map.

    Args:
        in_channels: the channels of a token.
        out_channels: the channels of the map.
        hidden_channels: the channels between the two convolutions.
        reduce: how tokens in one cell are combined: ``"mean"``, ``"sum"`` or ``"amax"``.
        spatial_dims: 2 or 3.
        device: where the weights are made; torch's default if None.
        dtype: the type of the weights; torch's default if None.

    Raises:
        ValueError: if ``reduce`` or ``spatial_dims`` has another value.

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

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int = 64,
        reduce: Reduce = "mean",
        spatial_dims: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims=}")
        check_counts(in_channels=in_channels, out_channels=out_channels, hidden_channels=hidden_channels)
        check_reduce(reduce)
        conv: Any = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        norm: Any = nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d
        self.in_channels, self.out_channels = in_channels, out_channels
        self.reduce: Reduce = reduce
        self.method: Method | None = None
        self.conv1 = conv(in_channels, hidden_channels, 3, padding=1, **factory)
        self.norm = norm(hidden_channels, **factory)
        self.conv2 = conv(hidden_channels, out_channels, 3, padding=1, **factory)

    def forward(
        self,
        tokens: Annotated[Tensor, "B N C"],
        keypoints: Keypoints,
        size: Sequence[int],
        *,
        features: Annotated[Tensor, "B F *S"] | None = None,
        gain: Annotated[Tensor, "out"] | None = None,
    ) -> Annotated[Tensor, "B F+out *S"]:
        """Spreads tokens over a map of the given size.

        Args:
            tokens: (B, N, C), one per slot. Slots that are not valid may hold anything.
            keypoints: the positions of the tokens.
            size: the map's size in tensor order.
            features: a map (B, F, *size). The result is concatenated behind its channels.
            gain: (out_channels,), a factor for each channel. With it the result is added to the features instead.

        Returns:
            (B, out_channels, *size), or F channels more after concatenation.

        Raises:
            TypeError: if an argument has another type.
            ValueError: if shapes do not fit, tokens do not have the weights' type, or a gain comes without features.
        """
        check_tokens(tokens, keypoints, channels=self.in_channels)
        check_precision(self, tokens=tokens)
        check_size(size, keypoints)
        if features is not None:
            check_floats(features=features)
            if features.shape[0] != tokens.shape[0] or features.shape[2:] != tuple(size):
                raise ValueError(f"features must be (B, F, *size), got {features.shape=}, {tokens.shape=} and {size=}")
        if gain is not None:
            check_floats(gain=gain)
            channels, needed = None if features is None else features.shape[1], self.out_channels
            if (channels, *gain.shape) != (needed, needed):
                got = f"got {gain.shape=} and features of {channels} channels"
                raise ValueError(f"with a gain, features must have {needed} channels, and gain as many numbers, {got}")
        needs_pixels = isinstance(self.norm, nn.modules.batchnorm._BatchNorm) and self.norm.training
        needs_pixels = needs_pixels and not is_synchronised(self.norm)
        if needs_pixels and tokens.shape[0] * prod(size) == 1:
            raise ValueError(
                f"batch statistics need more than one pixel, got {tokens.shape=} and {size=}; call .eval()"
            )
        channels_last = {2: torch.channels_last, 3: torch.channels_last_3d}[len(size)]
        last = features is not None and features.is_contiguous(memory_format=channels_last)
        layout = channels_last if last else torch.contiguous_format
        diffused = self._diffuse(tokens, keypoints, size, gain).contiguous(memory_format=layout)
        if features is None:
            return diffused
        return torch.cat([features, diffused], dim=1) if gain is None else features + diffused

    def _diffuse(self, tokens: Tensor, keypoints: Keypoints, size: Sequence[int], gain: Tensor | None) -> Tensor:
        method = self._method(tokens, size)
        if method == "dense":
            sparse = scatter_keypoints(tokens, keypoints, size, reduce=self.reduce)
            return _scale(self.conv2(F.relu(self.norm(self.conv1(sparse)))), gain)
        cells = keypoints.cells(size)
        shares = cell_shares(tokens, keypoints, cells, size, reduce=self.reduce)
        weighted = tokens.where(keypoints.valid[..., None], 0.0) * shares.to(tokens.dtype)
        if method == "hybrid":
            return _scale(self.conv2(F.relu(self.norm(self._first(weighted, cells, size)))), gain)
        return self._rows(weighted, cells, size, gain)

    def _method(self, tokens: Tensor, size: Sequence[int]) -> Method:
        """The cheapest method, or the chosen one, if it gives the result of the modules."""
        method = self.method or cheapest_method(
            tokens.shape[1], size, device=tokens.device, dtype=product_dtype(tokens)
        )
        # An empty batch has no statistics; torch's own modules handle it.
        if tokens.shape[0] == 0 or not _is_plain_convolution(self.conv1):
            return "dense"
        if method == "rows" and not (_is_plain_convolution(self.conv2) and _is_plain_batch_norm(self.norm)):
            return "hybrid"
        return method

    def _first(self, tokens: Tensor, cells: Tensor, size: Sequence[int]) -> Annotated[Tensor, "B hidden *S"]:
        """The first convolution, into a map of all pixels and one more pixel, which collects what falls outside."""
        weight, bias, pixels = self.conv1.weight, self.conv1.bias, cells.shape[0] * prod(size)
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        elif self.norm.training and isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            # The mean removes it again. Its gradient is zero; autograd would accumulate rounding errors instead.
            bias = bias.detach() + 0 * bias
        index, inside = find_neighbours(cells, size, radius=1)
        samples = torch.arange(cells.shape[0], device=cells.device)[:, None, None]
        places = torch.add(index, samples, alpha=prod(size)).where(inside, pixels)
        hidden = convolve_tokens(
            tokens, weight, places, bias.to(at_least_float32(weight.dtype)).expand(pixels + 1, -1)
        )[:-1]
        # Channels first, because with channels last torch's batch statistics lose precision on a CPU.
        return hidden.view(-1, *size, weight.shape[0]).movedim(-1, 1).to(tokens.dtype).contiguous()

    def _rows(self, tokens: Tensor, cells: Tensor, size: Sequence[int], gain: Tensor | None) -> Tensor:
        """Both convolutions around the keypoints: each keypoint's patch is added to the map without keypoints."""
        # Each weight is read once, because a parametrization may change when it is read.
        first, weight, bias = self.conv1.weight, self.conv2.weight, self.conv2.bias
        if gain is not None:  # scales the weights, so that no map needs to be scaled
            weight, bias = _scale(weight.transpose(0, 1), gain).transpose(0, 1), None if bias is None else bias * gain
        near, inside = find_neighbours(cells, size, radius=2)
        rows = find_rows(closest(near, len(size)), closest(inside, len(size)), size)
        start = tokens.new_zeros(rows.numel() + 1, first.shape[0], dtype=at_least_float32(first.dtype))
        # Without what fell outside. To a compiler the gradient of a slice would look like start, and be kept.
        hidden, _ = convolve_tokens(tokens, first, rows, start).split([rows.numel(), 1])
        hidden, constant = normalise_rows(self.norm, hidden, self.conv1.bias, pixels=cells.shape[0] * prod(size))

        # Like F.relu, but it keeps only a mask for the backward pass, a quarter of the size.
        hidden, constant = hidden.masked_fill(hidden <= 0, 0.0), F.relu(constant)
        deviations = (hidden - constant).to(weight.dtype).view(*rows.shape, first.shape[0])
        patches = convolve_deviations(deviations, weight).mul_(inside[:, :, None])

        with without_autocast(tokens.device):  # a map of three pixels along each axis is not worth the conversions
            background, border, differences = convolve_constant(constant.to(weight.dtype), weight, bias, size)
        background, differences = background.to(patches.dtype), differences.to(patches.dtype)
        batch, channels = cells.shape[0], background.shape[0]
        changed = torch.cat([near.flatten(1), border.expand(batch, -1)], dim=1)[:, None].expand(-1, channels, -1)
        patches = patches.transpose(1, 2).flatten(2)
        changes = torch.cat([patches, differences.expand(batch, -1, -1)], dim=2)
        result = background[:, None].expand(batch, -1, prod(size)).scatter_add(2, changed, changes)
        return torch.unflatten(result, 2, size)

    def extra_repr(self) -> str:
        """The options that its parts do not show."""
        return f"reduce={self.reduce!r}" if self.method is None else f"reduce={self.reduce!r}, method={self.method!r}"


def _scale(diffused: Annotated[Tensor, "B O *S"], gain: Annotated[Tensor, "O"] | None) -> Annotated[Tensor, "B O *S"]:
    if gain is None:
        return diffused
    return diffused * gain.to(diffused.dtype).view(-1, *[1] * (diffused.ndim - 2))


def _is_plain_convolution(module: Any) -> bool:
    """Whether it is a 3x3 or 3x3x3 convolution that does nothing but what its weight and bias determine."""
    if not _is_called_plainly(module, nn.Conv2d, nn.Conv3d):
        return False
    ones = (1,) * len(module.kernel_size)
    shape = module.kernel_size, module.padding, module.stride, module.dilation
    plain = shape == ((3,) * len(ones), ones, ones, ones) and module.groups == 1 and module.padding_mode == "zeros"
    # Quantized and distributed tensors are for the module itself.
    return plain and not any(hasattr(parameter, "__tensor_flatten__") for parameter in module.parameters())


def _is_plain_batch_norm(module: Any) -> bool:
    if not _is_called_plainly(module, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return False
    known: bool = module.affine and module.track_running_stats
    # torch cannot compile a differentiable sum over processes.
    return known and not (is_synchronised(module) and torch.compiler.is_compiling())


def _is_called_plainly(module: Any, *types: type[nn.Module]) -> bool:
    """Whether a call is exactly the forward pass of one of the types: no subclass, no hooks, no forward of its own."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type_before_parametrizations(module) in types and not any(hooks) and "forward" not in module.__dict__
