"""Sinkhorn's algorithm against the unrolled loop in float64, and the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kaf_layer.matching import log_sinkhorn

REFERENCE = Path(__file__).parents[3] / "shared/reference/authors_reference.npz"
NAN = float("nan")


def unrolled(scores: Tensor, dustbin: Tensor, iterations: int) -> Tensor:
    """One sample (M, N), alternating normalisation of rows and columns in the log domain."""
    rows, columns = scores.shape
    z = torch.cat([scores, dustbin.expand(rows, 1)], dim=1)
    z = torch.cat([z, dustbin.expand(1, columns + 1)])
    log_rows = torch.tensor([1.0] * rows + [columns], dtype=z.dtype).log()
    log_columns = torch.tensor([1.0] * columns + [rows], dtype=z.dtype).log()
    u, v = torch.zeros_like(log_rows), torch.zeros_like(log_columns)
    for _ in range(iterations):
        u = log_rows - (z + v).logsumexp(dim=1)
        v = log_columns - (z + u[:, None]).logsumexp(dim=0)
    return z + u[:, None] + v


def example(scale: float, *, batch: int = 3, rows: int = 7, columns: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = scale * torch.randn(batch, rows, columns, generator=generator, dtype=torch.float64)
    weights = torch.randn(batch, rows + 1, columns + 1, generator=generator, dtype=torch.float64)
    return scores.requires_grad_(), torch.tensor(1.0, dtype=torch.float64, requires_grad=True), weights


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_unrolled(iterations: int, scale: float) -> None:
    scores, dustbin, weights = example(scale)
    result = log_sinkhorn(scores, dustbin, iterations=iterations)
    expected = torch.stack([unrolled(sample, dustbin, iterations) for sample in scores])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    grads, expected_grads = (
        torch.autograd.grad((value * weights).sum(), (scores, dustbin)) for value in (result, expected)
    )
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dustbin", [-300.0, 0.0, 300.0])
def test_float32_of_any_range(dustbin: float) -> None:
    scores, _, weights = example(300.0)
    single, bin_score = scores.detach().float().requires_grad_(), torch.tensor(dustbin, requires_grad=True)
    result = log_sinkhorn(single, bin_score)
    (result * weights).sum().backward()
    exact = single.detach().double().requires_grad_()
    expected = torch.stack([unrolled(sample, bin_score.detach().double(), 100) for sample in exact])
    (expected * weights).sum().backward()
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(single.grad.double(), exact.grad, rtol=1e-3, atol=2e-3)


def test_padding_influences_nothing() -> None:
    scores, dustbin, weights = example(3.0, batch=5)
    generator = torch.Generator().manual_seed(1)
    counts = [(7, 9), (4, 6), (0, 5), (3, 0), (0, 0)]
    valid_a, valid_b = torch.zeros(5, 7, dtype=torch.bool), torch.zeros(5, 9, dtype=torch.bool)
    for i, (rows, columns) in enumerate(counts):
        valid_a[i, torch.randperm(7, generator=generator)[:rows]] = True
        valid_b[i, torch.randperm(9, generator=generator)[:columns]] = True
    real = valid_a[:, :, None] & valid_b[:, None]
    garbage = scores.detach().masked_fill(~real, NAN).requires_grad_()
    result = log_sinkhorn(garbage, dustbin, valid_a=valid_a, valid_b=valid_b)
    weights = weights.masked_fill(result.detach() == -torch.inf, NAN)  # no gradient from what is not there
    grads = torch.autograd.grad(result, (garbage, dustbin), weights)
    expected_grads = [torch.zeros_like(scores), torch.zeros_like(dustbin)]
    for i, (rows, columns) in enumerate(counts):
        a, b = valid_a[i].nonzero().flatten(), valid_b[i].nonzero().flatten()
        a, b = torch.cat([a, a.new_tensor([7])]), torch.cat([b, b.new_tensor([9])])
        if rows and columns:
            expected = unrolled(scores[i][a[:-1]][:, b[:-1]], dustbin, 100)
            torch.testing.assert_close(result[i][a][:, b], expected, rtol=0, atol=1e-10)
            part = torch.autograd.grad((expected * weights[i][a][:, b]).sum(), (scores, dustbin))
            expected_grads = [total + grad for total, grad in zip(expected_grads, part, strict=True)]
        else:  # everything there is goes to the dustbin
            assert (result[i][a[:-1], 9] == 0).all()
            assert (result[i][7, b[:-1]] == 0).all()
        absent = torch.ones(8, 10, dtype=torch.bool)
        absent[a[:, None], b] = False
        assert (result[i][absent] == -torch.inf).all()
    torch.testing.assert_close(grads, tuple(expected_grads), rtol=0, atol=1e-10)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the authors' numbers are not at hand (../shared/reference)")
def test_authors() -> None:
    reference = np.load(REFERENCE)
    result = log_sinkhorn(torch.from_numpy(reference["sinkhorn.scores"]), torch.tensor(1.0))
    torch.testing.assert_close(result, torch.from_numpy(reference["sinkhorn.log_assignment"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    scores, dustbin, weights = (tensor.detach().float() for tensor in example(1.0))
    low = scores.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        result = log_sinkhorn(low, dustbin)
        (result * weights).sum().backward()
    exact = low.detach().float().requires_grad_()
    expected = log_sinkhorn(exact, dustbin)
    (expected * weights).sum().backward()
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(low.grad, exact.grad.to(dtype))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch 2.14: opcheck reads that of a copy
@pytest.mark.parametrize("sizes", [(3, 3), (600, 4), (4, 600)])
@pytest.mark.parametrize("empty", ["a", "b", "both"])
def test_a_side_without_points(sizes: tuple[int, int], empty: str) -> None:
    """The points of the other side have no partner; no gradient is lost or infinite."""
    scores = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dustbin = torch.tensor(1.0, requires_grad=True)
    valid_a, valid_b = (torch.ones(2, size, dtype=torch.bool) for size in sizes)
    for side, valid in (("a", valid_a), ("b", valid_b)):
        valid[0] = empty not in (side, "both")
    result = log_sinkhorn(scores, dustbin, valid_a=valid_a, valid_b=valid_b)
    assert torch.allclose(result[0, :-1, -1].exp(), valid_a[0].float(), atol=1e-4)
    assert torch.allclose(result[0, -1, :-1].exp(), valid_b[0].float(), atol=1e-4)
    gradients = torch.autograd.grad(result.exp()[:, :-1].sum(), (scores, dustbin))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][0].any()
    assert gradients[0][1].any()


def test_compiles_and_exports() -> None:
    scores, dustbin, weights = example(1.0)
    compiled = torch.compile(log_sinkhorn, fullgraph=True, backend="aot_eager")
    value, expected = (function(scores, dustbin) for function in (compiled, log_sinkhorn))
    torch.testing.assert_close(value, expected)
    grads = [torch.autograd.grad((result * weights).sum(), (scores, dustbin)) for result in (value, expected)]
    torch.testing.assert_close(*grads)

    class Module(torch.nn.Module):
        def forward(self, scores: Tensor, dustbin: Tensor) -> Tensor:
            return log_sinkhorn(scores, dustbin, iterations=5)

    masses = torch.ones(3, 7, dtype=torch.float64), torch.ones(3, 9, dtype=torch.float64)
    torch.library.opcheck(torch.ops.kaf_layer.sinkhorn.default, (scores, *masses, 2))
    exported = torch.export.export(Module(), (scores, dustbin)).module()
    torch.testing.assert_close(exported(scores, dustbin), log_sinkhorn(scores, dustbin, iterations=5))


def test_errors() -> None:
    scores, dustbin, _ = example(1.0)
    with pytest.raises(ValueError, match=r"scores must be \(B, M, N\)"):
        log_sinkhorn(scores[0], dustbin)
    with pytest.raises(ValueError, match="dustbin 0-d"):
        log_sinkhorn(scores, dustbin[None])
    with pytest.raises(ValueError, match="iterations=0"):
        log_sinkhorn(scores, dustbin, iterations=0)
    with pytest.raises(ValueError, match=r"valid_b must be bool, \(3, 9\)"):
        log_sinkhorn(scores, dustbin, valid_b=torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="valid_a must be bool"):
        log_sinkhorn(scores, dustbin, valid_a=torch.ones(3, 7))
