"""Single precision where it is promised: settings that allow less do not reach it, and are as they were afterwards."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kaf_layer.matching import log_sinkhorn
from kaf_layer.precision import exact_products, without_autocast

BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def old_interface() -> None:
    torch.set_float32_matmul_precision("high")


def new_interface() -> None:
    for backend in BACKENDS:
        backend.fp32_precision = "tf32"


@pytest.fixture(params=[old_interface, new_interface])
def low_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    before = [backend.fp32_precision for backend in BACKENDS]
    request.param()
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, value in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = value


def precisions() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.mark.usefixtures("low_precision")
def test_settings_are_restored() -> None:
    before = precisions()
    with exact_products():
        assert precisions() == ["ieee", "ieee"]
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert precisions() == before == ["tf32", "tf32"]


@pytest.mark.usefixtures("low_precision")
def test_sinkhorn_multiplies_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and the backward pass, whose products are all made by bmm."""
    seen = []
    multiply: Callable[..., Tensor] = torch.bmm

    def bmm(*arguments: Tensor, **options: Tensor) -> Tensor:
        seen.append(precisions())
        return multiply(*arguments, **options)

    monkeypatch.setattr(torch, "bmm", bmm)
    scores = torch.randn(2, 5, 6, requires_grad=True)
    result = log_sinkhorn(scores, torch.tensor(1.0), iterations=7)
    forward = len(seen)
    result.sin().sum().backward()
    assert 0 < forward < len(seen)
    assert all(precision == ["ieee", "ieee"] for precision in seen)


def test_a_device_without_autocast_is_left_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with without_autocast(torch.device("meta")):
        assert (torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")).dtype == torch.float32
