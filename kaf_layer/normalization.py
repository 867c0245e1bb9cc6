"""Batch normalisation of tokens whose statistics see keypoints only, never a padded slot."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["MaskedBatchNorm", "Moments"]


class Moments(NamedTuple):
    """The statistics of one batch: mean and biased variance (C,) over a number of valid slots."""

    mean: Tensor
    variance: Tensor
    slots: Tensor


class _Normalize(torch.autograd.Function):
    """Written out because autograd would save the centred tokens beside the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        mask = valid[..., None]
        values = x.to(_wide(weight))
        count = valid.sum()
        mean = (values * mask).sum((0, 1)) / count.clamp(min=1)
        # Zero where not valid: of one valid slot, whose variance is zero, large values would come there.
        centred = (values - mean) * mask
        variance = centred.square().sum((0, 1)) / count.clamp(min=1)
        inverse_std = (variance + eps).rsqrt()
        ctx.save_for_backward(x, valid, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)  # else zeros are made for the moments
        normalised = (centred * (inverse_std * weight) + bias).to(x.dtype)
        # A view, as torch 2.11 compiles no gradient for a result that .to() returned as it was.
        return normalised.view_as(x), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 5
        x, valid, weight, mean, inverse_std, count = ctx.saved_tensors
        mask = valid[..., None]
        gradient = gradient.to(_wide(weight)) * mask
        standard = (x.to(_wide(weight)) - mean) * inverse_std
        grad_bias, grad_weight = gradient.sum((0, 1)), (gradient * standard).sum((0, 1))
        shared = (grad_bias + standard * grad_weight) / count.clamp(min=1)
        grad_x = (gradient - shared * mask) * (inverse_std * weight)
        return grad_x.to(x.dtype), None, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


class MaskedBatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy, 2015) of tokens (B, N, C) over their valid slots.

    The running statistics are moved by :meth:`track`, apart from :meth:`forward`, so that a
    forward pass that is repeated for the backward pass moves them once.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: the weight of the newest batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(
        self, tokens: Annotated[Tensor, "B N C"], valid: Annotated[Tensor, "B N"]
    ) -> tuple[Annotated[Tensor, "B N C"], Moments | None]:
        """The normalised tokens and, in training mode, the moments to :meth:`track`.

        Slots that are not valid must hold finite values.
        """
        if self.training:
            normalised, *moments = _Normalize.apply(tokens, valid, self.weight, self.bias, self.eps)
            return normalised, Moments(*moments)
        statistics = self.running_mean, self.running_var
        rows = F.batch_norm(tokens.flatten(0, 1), *statistics, self.weight, self.bias, eps=self.eps)
        return rows.unflatten(0, tokens.shape[:2]), None

    @torch.no_grad()
    def track(self, moments: Moments | None) -> None:
        """Moves the running statistics towards ``moments``; a batch without keypoints leaves them."""
        if moments is None:
            return
        momentum = self.momentum * (moments.slots > 0)
        unbiased = moments.variance * moments.slots / (moments.slots - 1).clamp(min=1)
        self.running_mean.add_((moments.mean - self.running_mean) * momentum)
        self.running_var.add_((unbiased - self.running_var) * momentum)
        self.num_batches_tracked.add_(1)
