"""Optimal transport between two sets of keypoints, with a dustbin on either side, in little memory."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from kaf_layer.checks import check_counts, check_floats

__all__ = ["log_sinkhorn"]

# Iterations on one exponentiated matrix. With a dustbin, one iteration changes a scaling by at most a factor of
# 2 (M + N). For M + N up to 4096, what underflows in float32 stays negligible, and nothing overflows, for 3 of them.
_STEPS = 3


def log_sinkhorn(
    scores: Annotated[Tensor, "B M N"],
    dustbin: Annotated[Tensor, ""],
    *,
    iterations: int = 100,
    valid_a: Annotated[Tensor, "B M"] | None = None,
    valid_b: Annotated[Tensor, "B N"] | None = None,
) -> Annotated[Tensor, "B M+1 N+1"]:
    """Log-probabilities of a partial assignment by Sinkhorn's algorithm (Sarlin et al., CVPR 2020, Section 3.2).

    Each valid row and column of the exponentiated result sums to 1, those of the dustbins (the last ones) to the
    number of valid points on the other side: columns exactly, rows after many iterations. The gradient is that of
    the unrolled iterations, from O(iterations * (M + N) + M * N) memory, as only the scaling vectors are kept.

    Args:
        scores: (B, M, N), the higher the better; computed in float32 at least, also under autocast.
        dustbin: 0-d, the score of having no partner, commonly learned.
        iterations: of row and column normalisation, at least 1.
        valid_a: (B, M) bool, which rows are points; all if None.
        valid_b: (B, N) bool, which columns are points; all if None.

    Returns:
        (B, M + 1, N + 1). Where there is no mass, as in rows and columns that are not valid, it is -inf and takes
        no gradient.

    Raises:
        TypeError: if an argument is no tensor.
        ValueError: if a shape or type does not fit, or there is no iteration.

    Example:
        >>> scores = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])  # 0 with 0, and 1 with 2
        >>> log_sinkhorn(scores, torch.tensor(1.0)).exp().round(decimals=1)
        tensor([[[1., 0., 0., 0.],
                 [0., 0., 1., 0.],
                 [0., 1., 0., 2.]]])
    """
    batch, rows, columns = _check(scores, dustbin, iterations, valid_a, valid_b)
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        a = scores.new_ones(batch, rows) if valid_a is None else valid_a.to(scores.dtype)
        b = scores.new_ones(batch, columns) if valid_b is None else valid_b.to(scores.dtype)
        dustbin = dustbin.to(scores.dtype)
        scores = torch.cat([scores, dustbin.expand(batch, rows, 1)], dim=2)
        scores = torch.cat([scores, dustbin.expand(batch, 1, columns + 1)], dim=1)
        mass_a = torch.cat([a, b.sum(dim=1, keepdim=True)], dim=1)
        mass_b = torch.cat([b, a.sum(dim=1, keepdim=True)], dim=1)
        log_assignment: Tensor = _sinkhorn(scores, mass_a, mass_b, iterations)[0]
        return log_assignment


@torch.library.custom_op("kaf_layer::sinkhorn", mutates_args=())
def _sinkhorn(scores: Tensor, mass_a: Tensor, mass_b: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The log-assignment, and the logarithms of all scalings, (iterations, B, M) and (iterations + 1, B, N).

    An operator of its own, as a compiler would otherwise unroll the iterations.
    """
    scores, (mass_a, empty_a), (mass_b, empty_b) = _masked(scores, mass_a, mass_b)
    u = (mass_a.log() - scores.logsumexp(dim=2)).masked_fill(empty_a > 0, 0.0)
    v = torch.zeros_like(mass_b)
    log_a, log_b = [], [v]
    for start in range(0, iterations, _STEPS):
        kernel = _kernel(scores, u, v)
        b = torch.ones_like(v)
        for _ in range(start, min(start + _STEPS, iterations)):
            a = mass_a / (_times(kernel, b) + empty_a)
            b = mass_b / (_times(kernel.mT, a) + empty_b)
            log_a.append(u + a.log())
            log_b.append(v + b.log())
        u, v = log_a[-1], log_b[-1]
    return scores + u[:, :, None] + v[:, None], torch.stack(log_a), torch.stack(log_b)


@torch.library.custom_op("kaf_layer::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(
    grad: Tensor, scores: Tensor, mass_a: Tensor, mass_b: Tensor, log_a: Tensor, log_b: Tensor
) -> Tensor:
    """The gradient of the scores: of each iteration an outer product of vectors times its matrix.

    With u_k = log mass_a - logsumexp(scores + v_k-1) over columns, and v_k likewise from u_k, the chain rule takes
    the matrices exp(scores + u_k + v_k-1) / mass_a and exp(scores + u_k + v_k) / mass_b. Both are one kernel
    between two diagonal matrices, so that a few iterations share one exponentiation and one matrix product.
    """
    scores, (mass_a, _), (mass_b, _) = _masked(scores, mass_a, mass_b)
    grad = grad.masked_fill(scores == -torch.inf, 0.0)
    grad_u, grad_v, total = grad.sum(dim=2), grad.sum(dim=1), grad
    for start in reversed(range(0, len(log_a), _STEPS)):
        u, v = log_a[start], log_b[start]
        kernel = _kernel(scores, u, v)
        left, right = [], []
        for step in reversed(range(start, min(start + _STEPS, len(log_a)))):
            a = (log_a[step] - u).exp()
            b, b_before = (log_b[step + 1] - v).exp(), (log_b[step] - v).exp()
            from_v = b * grad_v / mass_b
            from_u = a * (grad_u - a * _times(kernel, from_v)) / mass_a
            grad_v = -b_before * _times(kernel.mT, from_u)
            grad_u = torch.zeros_like(grad_u)  # the result holds the last u itself; earlier ones reach it by v alone
            left += [a, from_u]
            right += [from_v, b_before]
        total = torch.addcmul(total, kernel, torch.stack(left, dim=2) @ torch.stack(right, dim=1), value=-1)
    return total


def _masked(scores: Tensor, *masses: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The scores, -inf where there is no mass; and per side the masses, 1 in place of 0, and 1 where they were 0."""
    empty_a, empty_b = (mass == 0 for mass in masses)
    scores = scores.masked_fill(empty_a[:, :, None] | empty_b[:, None], -torch.inf)
    a, b = ((mass + empty, empty.to(mass.dtype)) for mass, empty in zip(masses, (empty_a, empty_b), strict=True))
    return scores, a, b


def _kernel(scores: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (scores + u[:, :, None]).add_(v[:, None]).exp_()


def _times(matrix: Annotated[Tensor, "B M N"], vector: Annotated[Tensor, "B N"]) -> Annotated[Tensor, "B M"]:
    return torch.bmm(vector[:, None], matrix.mT)[:, 0]  # on a CPU ten times faster than matrix @ column


@_sinkhorn.register_fake
def _(scores: Tensor, mass_a: Tensor, mass_b: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    log_a, log_b = mass_a.new_empty(iterations, *mass_a.shape), mass_b.new_empty(iterations + 1, *mass_b.shape)
    return torch.empty_like(scores), log_a, log_b


@_sinkhorn_backward.register_fake
def _(grad: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, mass_a, mass_b, _ = inputs
    ctx.save_for_backward(scores, mass_a, mass_b, output[1], output[2])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad.device.type, enabled=False):
        return _sinkhorn_backward(grad, *ctx.saved_tensors), None, None, None


_sinkhorn.register_autograd(_backward, setup_context=_save)


def _check(
    scores: Tensor, dustbin: Tensor, iterations: int, valid_a: Tensor | None, valid_b: Tensor | None
) -> torch.Size:
    check_floats(scores=scores, dustbin=dustbin)
    check_counts(iterations=iterations)
    if scores.ndim != 3 or dustbin.ndim != 0:
        raise ValueError(f"scores must be (B, M, N) and dustbin 0-d, got {scores.shape=} and {dustbin.shape=}")
    for name, valid, shape in (("valid_a", valid_a, scores.shape[:2]), ("valid_b", valid_b, scores.shape[::2])):
        if valid is not None and (valid.shape != shape or valid.dtype != torch.bool):
            raise ValueError(f"{name} must be bool, {tuple(shape)}, got {valid.dtype=} and {valid.shape=}")
    return scores.shape
