"""Optimal transport between two sets of keypoints, with a dustbin on either side, in little memory."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from kaf_layer.checks import check_counts, check_floats
from kaf_layer.precision import at_least_float32, exact_products, without_autocast

__all__ = ["log_sinkhorn"]

# Iterations on one exponentiated matrix. With a dustbin, one iteration changes a scaling by at most a factor of
# 2 (M + N). For M + N up to 4096, what underflows in float32 stays negligible, and nothing overflows, for 3 of them.
_STEPS = 3
_NOTHING = 1e-20  # the mass of empty rows and columns: lost in rounding next to 1, and far from underflow


def log_sinkhorn(
    scores: Annotated[Tensor, "B M N"],
    dustbin: Annotated[Tensor, ""],
    *,
    iterations: int = 100,
    valid_a: Annotated[Tensor, "B M"] | None = None,
    valid_b: Annotated[Tensor, "B N"] | None = None,
) -> Annotated[Tensor, "B M+1 N+1"]:
    """Log-probabilities of a partial assignment by Sinkhorn's algorithm (Sarlin et al., CVPR 2020, Section 3.2).

    Each valid row and column of the exponentiated result sums to 1. Those of the dustbins, the last ones, sum to the
    number of valid points on the other side. For columns this is exact, for rows after many iterations. The gradient is
    that of the unrolled iterations, with O(iterations * (M + N) + M * N) memory, since only scaling vectors are kept.

    Args:
        scores: (B, M, N), the higher the better. They are computed in float32 at least, also under autocast and where
            ``torch.set_float32_matmul_precision`` allows less.
        dustbin: 0-d, the score of having no partner, usually learned.
        iterations: the number of row and column normalisations, at least 1.
        valid_a: (B, M) bool, which rows are points; all if None.
        valid_b: (B, N) bool, which columns are points; all if None.

    Returns:
        (B, M + 1, N + 1). Where there is no mass, as in rows and columns that are not valid, it is -inf and receives
        no gradient.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if a shape or type does not fit, or ``iterations`` is less than 1.

    Example:
        >>> scores = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])  # 0 with 0, and 1 with 2
        >>> log_sinkhorn(scores, torch.tensor(1.0)).exp().round(decimals=1)
        tensor([[[1., 0., 0., 0.],
                 [0., 0., 1., 0.],
                 [0., 1., 0., 2.]]])
    """
    batch, rows, columns = _check(scores, dustbin, iterations, valid_a, valid_b)
    with without_autocast(scores.device):
        scores = scores.to(at_least_float32(scores.dtype))
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
def _sinkhorn(scores: Tensor, mass_a: Tensor, mass_b: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-assignment, and what its gradient needs: v (blocks, B, N), a (iterations, B, M), b (iterations, B, N).

    It is a custom operator, since a compiler would otherwise unroll the iterations. A block is a few iterations, which
    scale one matrix K = softmax(scores + v) by vectors a and b. The rows of K sum to 1, so that the block's first a is
    mass_a; after it, v grows by the logarithm of its last b.
    """
    scores, mass_a, mass_b, absent = _masked(scores, mass_a, mass_b)
    a, b = mass_a.repeat(iterations, 1, 1), mass_b.new_empty(iterations, *mass_b.shape)
    v = [mass_b.clamp(max=1.0).log()]  # 0, but for empty columns
    with exact_products():
        for start in range(0, iterations, _STEPS):
            if start:
                v.append(v[-1] + b[start - 1].log())
            kernel = _kernel(scores, v[-1])
            for step in range(start, min(start + _STEPS, iterations)):
                if step > start:
                    torch.div(mass_a, _times(kernel, b[step - 1]), out=a[step])
                torch.div(mass_b, _times(kernel.mT, a[step]), out=b[step])
    # In logarithms from here on, where what had underflowed in the matrix is exact.
    u = a[-1].log() - (scores + v[-1][:, None]).logsumexp(dim=2)
    scores = scores.add_(u[:, :, None])
    result = scores.add_((mass_b.log() - scores.logsumexp(dim=1))[:, None])  # the last b, without rounding
    return result.masked_fill_(absent, -torch.inf), torch.stack(v), a, b


@torch.library.custom_op("kaf_layer::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(
    grad: Tensor, scores: Tensor, mass_a: Tensor, mass_b: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """The gradient of the scores: for each iteration two outer products of vectors, times the matrix K of its block.

    By the chain rule through ``log b_k = log mass_b - log K' a_k`` and ``log a_k = log mass_a - log K b_k-1``, K
    takes ``a_k y_k' + x_k b_k-1'``. Here ``y_k = -b_k / mass_b * g`` with the gradient g of log b_k,
    ``x_k = -a_k^2 / mass_a * K y_k``, and log b_k-1 gets ``b_k-1 * K' x_k``.
    """
    scores, mass_a, mass_b, absent = _masked(scores, mass_a, mass_b)
    total = grad.masked_fill(absent, 0.0)
    before = torch.cat([torch.ones_like(b[:1]), b[:-1]])
    before[::_STEPS] = 1.0  # v holds the rest
    left, right = torch.stack([a, a], dim=1), torch.stack([before, before], dim=1)  # a_k and x_k; y_k and b_k-1
    # What has no mass passes nothing on; its quotient may have overflowed.
    from_a, from_b = ((-x / mass).masked_fill(mass < 1, 0.0) for x, mass in ((a, mass_a), (b, mass_b)))
    # The result is a sum with the last a and b; earlier ones reach it only through the last b.
    direct = from_a[-1] * total.sum(dim=2)
    torch.mul(from_b[-1], total.sum(dim=1), out=right[-1, 0])
    from_a, from_b = from_a * a, from_b[:-1] * before[1:]
    with exact_products():
        for start in reversed(range(0, len(a), _STEPS)):
            kernel = _kernel(scores, v[start // _STEPS])
            for step in reversed(range(start, min(start + _STEPS, len(a)))):
                x = torch.mul(from_a[step], _times(kernel, right[step, 0]), out=left[step, 1])
                if step == len(a) - 1:
                    x += direct
                if step:
                    torch.mul(from_b[step - 1], _times(kernel.mT, x), out=right[step - 1, 0])
            rows, columns = (side[start : start + _STEPS].flatten(0, 1) for side in (left, right))
            total = torch.addcmul(total, kernel, torch.bmm(rows.permute(1, 2, 0), columns.transpose(0, 1)))
    return total


def _masked(scores: Tensor, mass_a: Tensor, mass_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scores, -inf where there is no mass; the masses, tiny instead of 0; and a mask of where there is none.

    Rows and columns without mass keep their dustbin, so that no sum is 0.
    """
    absent = (mass_a == 0)[:, :, None] | (mass_b == 0)[:, None]
    scores = scores.clone()  # a custom operator may not change its arguments
    scores[:, :-1, :-1].masked_fill_(absent[:, :-1, :-1], -torch.inf)
    return scores, _filled(mass_a, mass_b), _filled(mass_b, mass_a), absent


def _filled(mass: Annotated[Tensor, "B M"], other: Annotated[Tensor, "B N"]) -> Annotated[Tensor, "B M"]:
    """Masses with something tiny for 0; a dustbin without mass gets enough for the other side's empty points."""
    filled = mass.clamp(min=_NOTHING)
    filled[:, -1].clamp_(min=_NOTHING * other.shape[1])
    return filled


def _kernel(scores: Tensor, v: Tensor) -> Tensor:
    return (scores + v[:, None]).softmax(dim=2)


def _times(matrix: Annotated[Tensor, "B M N"], vector: Annotated[Tensor, "B N"]) -> Annotated[Tensor, "B M"]:
    return torch.bmm(vector[:, None], matrix.mT)[:, 0]  # on a CPU ten times faster than matrix @ column


@_sinkhorn.register_fake
def _(scores: Tensor, mass_a: Tensor, mass_b: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b = mass_a.new_empty(iterations, *mass_a.shape), mass_b.new_empty(iterations, *mass_b.shape)
    return torch.empty_like(scores), mass_b.new_empty(-(-iterations // _STEPS), *mass_b.shape), a, b


@_sinkhorn_backward.register_fake
def _(grad: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast(grad.device):
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
