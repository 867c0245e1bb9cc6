"""Batch normalisation (Ioffe and Szegedy, 2015) of padded tokens and sparse maps."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kaf_layer.precision import at_least_float32

__all__ = ["MaskedBatchNorm", "Moments", "is_synchronised", "normalise_rows", "normalise_tokens", "track"]


class Moments(NamedTuple):
    """The statistics of a batch: mean and unbiased variance (C,), and whether it held anything (1) or was empty (0)."""

    mean: Annotated[Tensor, "C"]
    variance: Annotated[Tensor, "C"]
    filled: Annotated[Tensor, ""] | float = 1.0


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of tokens (B, N, C) over their valid slots.

    Code that looks for batch norms finds it: code that freezes them, ``torch.optim.swa_utils.update_bn``, and
    ``SyncBatchNorm.convert_sync_batchnorm``. The last replaces it. Call it through ``normalise_tokens``, which
    accepts the replacement too.

    ``track`` updates the running statistics, separately from ``forward``, so that a forward pass that is
    repeated for the backward pass updates them once.
    """

    def forward(  # type: ignore[override]
        self, tokens: Annotated[Tensor, "B N C"], valid: Annotated[Tensor, "B N"]
    ) -> tuple[Annotated[Tensor, "B N C"], Moments | None]:
        """See ``normalise_tokens``."""
        return _normalise_tokens(self, tokens, valid)


def normalise_tokens(
    norm: nn.Module, tokens: Annotated[Tensor, "B N C"], valid: Annotated[Tensor, "B N"]
) -> tuple[Annotated[Tensor, "B N C"], Moments | None]:
    """Returns the normalised tokens and, in training mode, the moments for ``track``.

    Args:
        norm: a ``MaskedBatchNorm``, or the ``SyncBatchNorm`` that it was converted to.
        tokens: (B, N, C). Slots that are not valid must hold finite values.
        valid: (B, N) bool, which slots count.
    """
    if isinstance(norm, nn.SyncBatchNorm):  # its own forward pass takes no mask
        return _normalise_tokens(norm, tokens, valid)
    result: tuple[Tensor, Moments | None] = norm(tokens, valid)
    return result


def _normalise_tokens(norm: Any, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Moments | None]:
    if not norm.training:
        statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
        rows = F.batch_norm(tokens.flatten(0, 1), *statistics, eps=norm.eps)
        return torch.unflatten(rows, 0, tokens.shape[:2]), None
    values, mask = tokens.to(at_least_float32(norm.weight.dtype)), valid[..., None]
    total, count = _sum_over_processes(norm, (values * mask).sum((0, 1)), valid.sum())
    mean = total / count.clamp(min=1)
    # Zero where not valid, because with a single valid slot the variance is zero and 1 / std is large.
    centred = (values - mean) * mask
    # From centred values: E[x^2] - E[x]^2 would cancel where the mean is large.
    squares, _ = _sum_over_processes(norm, centred.square().sum((0, 1)), count)
    normalised = centred * ((squares / count.clamp(min=1) + norm.eps).rsqrt() * norm.weight) + norm.bias
    filled = (count > 0).to(mean.dtype)
    return normalised.to(tokens.dtype), Moments(mean, squares / (count - 1).clamp(min=1), filled)


def normalise_rows(
    norm: Any, rows: Annotated[Tensor, "R C"], bias: Annotated[Tensor, "C"] | None, *, pixels: int
) -> tuple[Annotated[Tensor, "R C"], Annotated[Tensor, "C"]]:
    """Batch normalisation of a sparse map: pixels that have a row, and all others, which are zero.

    It updates the running statistics in training mode.

    Args:
        norm: ``BatchNorm2d``, ``BatchNorm3d`` or ``SyncBatchNorm``, with weights and running statistics.
        rows: the pixels, without the bias; there may be empty rows.
        bias: is added to all pixels before normalisation.
        pixels: the number of all pixels, including those without a row.

    Returns:
        The normalised rows, and the value of every pixel without a row.
    """
    bias = torch.zeros_like(norm.running_mean) if bias is None else bias
    dtype = at_least_float32(norm.weight.dtype)
    if not norm.training:
        centre = (norm.running_mean - bias).to(dtype)
        centred, variance = rows - centre, norm.running_var.to(dtype)
    else:
        total, count = _sum_over_processes(norm, rows.sum(0), pixels)
        mean = total / count + bias
        centre = mean - bias  # of the rows; the bias stays in the graph, with a gradient of zero
        centred = rows - centre
        # Pixels without a row are zero, so each is `centre` away from the mean.
        squares = torch.addcmul(centred.square().sum(0), centre, centre, value=pixels - rows.shape[0])
        squares, _ = _sum_over_processes(norm, squares, pixels)
        variance = squares / count
        track(norm, Moments(mean, squares / (count - 1)))
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return torch.addcmul(norm.bias, centred, scale), torch.addcmul(norm.bias, centre, scale, value=-1)


@torch.no_grad()
def track(norm: Any, moments: Moments | None) -> None:
    """Moves a module's running statistics towards ``moments``; an empty batch does not move them.

    Args:
        norm: a batch norm with running statistics, and a momentum or None for the average of all batches.
        moments: the moments of a batch; None moves nothing.
    """
    if moments is None:
        return
    norm.num_batches_tracked.add_(1)
    running = norm.running_mean.dtype
    momentum = 1 / norm.num_batches_tracked.to(running) if norm.momentum is None else norm.momentum
    momentum = momentum * moments.filled
    norm.running_mean.lerp_(moments.mean.to(running), momentum)
    norm.running_var.lerp_(moments.variance.to(running), momentum)


def is_synchronised(norm: nn.Module) -> bool:
    """Whether a batch norm in training mode takes its statistics from several processes."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(norm.process_group) > 1


def _sum_over_processes(norm: nn.Module, values: Tensor, count: Any) -> tuple[Tensor, Any]:
    """The sums of values (C,) and of counts over the processes of a synchronised batch norm, else the arguments."""
    if not is_synchronised(norm):
        return values, count
    import torch.distributed.nn.functional  # not in every build of torch

    everything = torch.cat([values, torch.as_tensor(count, dtype=values.dtype, device=values.device).view(1)])
    # Differentiable, because each process's loss depends on the values of all.
    summed = torch.distributed.nn.functional.all_reduce(everything, group=norm.process_group or dist.group.WORLD)
    return summed[:-1], summed[-1]
