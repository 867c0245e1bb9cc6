"""At least single precision, whatever autocast and TF32 settings allow elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["exact_products", "without_autocast"]


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
