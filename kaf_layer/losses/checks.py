"""Errors about values, raised without making an accelerator wait."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

__all__ = ["refuse"]


def refuse(bad: Annotated[Tensor, "B *"], message: str, *, of: str = "samples") -> None:
    """Raises if any value is bad, without synchronising an accelerator.

    Args:
        bad: (B, ...) bool.
        message: what is wrong, and what to do.
        of: what the first axis counts.

    Raises:
        ValueError: on the CPU, with the numbers of the samples. On CUDA the message comes as a device-side
            assertion, and in compiled code as a RuntimeError, both without the numbers.

    Example:
        >>> refuse(torch.tensor([False, True]), "embeddings must be finite")
        Traceback (most recent call last):
            ...
        ValueError: embeddings must be finite, got other values in samples [1]
    """
    if bad.device.type == "cpu" and not torch.compiler.is_compiling():
        if bad.any():
            raise ValueError(f"{message}, got other values in {of} {sorted(set(bad.nonzero()[:, 0].tolist()))}")
    elif bad.device.type in ("cpu", "cuda"):  # other devices know no asynchronous assertion
        torch._assert_async(~bad.any(), message)
