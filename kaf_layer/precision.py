"""At least single precision, whatever autocast and TF32 settings allow elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["at_least_float32", "exact_products", "product_dtype", "single_under_autocast", "without_autocast"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which many values of a type are added: float32 for half precision, otherwise the type itself."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turns autocast off, if it is on."""
    return torch.autocast(device.type, enabled=False) if is_autocasting(device) else nullcontext()


def single_under_autocast(values: Tensor) -> Tensor:
    """Converts half to single precision under autocast, for sums that grow over many layers."""
    return values.to(at_least_float32(values.dtype)) if is_autocasting(values.device) else values


def product_dtype(values: Tensor) -> torch.dtype:
    """The type in which matrix products of values are computed: autocast's if it is on, otherwise their own."""
    return torch.get_autocast_dtype(values.device.type) if is_autocasting(values.device) else values.dtype


def is_autocasting(device: torch.device) -> bool:
    """Whether autocast is on; a device such as "meta" has none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiplies float32 matrices in float32, also after ``torch.set_float32_matmul_precision("high")``.

    Not for compiled code, which cannot change the settings of PyTorch.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
