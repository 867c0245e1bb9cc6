"""Measures forward and backward passes side by side: time, saved bytes, FLOPs and, on a GPU, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.measuring import CUDA, DEVICE, compare, count_flops, peak_bytes, saved_bytes
from kaf_layer import Keypoints


def random_keypoints(batch: int, slots: int, edge: int, spatial_dims: int = 2) -> Keypoints:
    """Draws keypoints each of which has a cell of its own."""
    cells = torch.stack([torch.randperm(edge**spatial_dims, device=DEVICE)[:slots] for _ in range(batch)])
    positions = torch.stack([cells // edge**axis % edge for axis in range(spatial_dims)], dim=-1).float()
    valid = torch.ones(batch, slots, dtype=torch.bool, device=DEVICE)
    return Keypoints(positions, valid, (edge,) * spatial_dims, padded=False)


def precision(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE, dtype)


def measure(
    forwards: Mapping[str, Callable[[], Tensor]],
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    repeats: int,
    backward: bool = True,
) -> dict[str, dict[str, float]]:
    """Returns each quantity (seconds, bytes, FLOPs), with its value for each forward pass.

    Args:
        forwards: the forward passes by name.
        inputs: the tensors that get gradients.
        dtype: the type of autocast; float32 means no autocast.
        repeats: how often each pass is timed.
        backward: whether the backward pass is timed as well.
    """

    def forward(run: Callable[[], Tensor]) -> Tensor:
        with precision(dtype):
            return run()

    # The gradient is as dense as a network's. That of sum() would be a single number, which is quicker to read.
    gradient = torch.ones_like(forward(next(iter(forwards.values()))))

    def both(run: Callable[[], Tensor]) -> None:
        forward(run).backward(gradient)
        for tensor in inputs:
            tensor.grad = None

    def each(value: Callable[[Callable[[], object]], float], step: Callable[..., object]) -> dict[str, float]:
        return {name: value(partial(step, run)) for name, run in forwards.items()}

    quantities = {
        pass_: compare({name: partial(step, run) for name, run in forwards.items()}, repeats=repeats)
        for pass_, step in (("forward", forward), ("forward+backward", both))
        if backward or pass_ == "forward"
    }
    quantities |= {
        "saved": each(partial(saved_bytes, aside=inputs), forward),
        "FLOPs": each(count_flops, forward),
    }
    return quantities | ({"peak": each(peak_bytes, both)} if CUDA else {})
