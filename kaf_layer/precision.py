"""At least single precision, whatever autocast and TF32 settings allow elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["at_least_float32", "exact_products", "without_autocast"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which many values of a type are added: float32 for half precision, otherwise the type itself."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turns autocast off; does nothing for a device without autocast, such as "meta"."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


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
