"""The product of tokens against numpy's, however it is computed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kaf_layer.linear import Linear, linear, linear_backward


def gradients(result: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return torch.autograd.grad(result, leaves, cotangent)


@pytest.mark.parametrize("shape", [(2, 24, 6), (3, 5, 6), (16, 6), (7, 6), (0, 6), (2, 0, 6), (2, 3, 8, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in (shape, (4, 6), (4,)))
        result = linear(x, weight, bias)
        expected = x.detach().double().numpy() @ weight.detach().double().numpy().T + bias.detach().double().numpy()
        np.testing.assert_allclose(result.detach().numpy(), expected, rtol=0, atol=1e-5)
        doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        oracle = gradients(doubles[0] @ doubles[1].mT + doubles[2], *doubles)
        for actual, gradient in zip(gradients(result, x, weight, bias), oracle, strict=True):
            torch.testing.assert_close(actual.double(), gradient, rtol=0, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_transposed_tokens_and_no_bias() -> None:
    x, weight = torch.randn(6, 32).mT, torch.randn(6, 4).mT
    expected = torch.einsum("mc,oc->mo", x.double(), weight.double())
    torch.testing.assert_close(linear(x, weight).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_followed(dtype: torch.dtype) -> None:
    module, x = Linear(6, 4), torch.randn(2, 16, 6)
    with torch.autocast("cpu", dtype):
        assert module(x).dtype == dtype


def test_it_is_a_linear_layer() -> None:
    module, x = Linear(6, 4), torch.randn(3, 7, 6)
    plain = torch.nn.Linear(6, 4)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), plain(x))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("rows", [16, 7, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_written_out_gradients(rows: int, dtype: torch.dtype) -> None:
    grad, x, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, 4), (rows, 6), (4, 6)))
    expected = grad.double() @ weight.double(), grad.double().mT @ x.double()
    for actual, gradient in zip(linear_backward(grad, x, weight), expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), gradient, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
