"""Times, saved bytes and FLOPs of a function that takes no arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
Run = Callable[[], object]


def compare(runs: Mapping[str, Run], *, repeats: int = 11, warmup: int = 2) -> dict[str, float]:
    """Returns the median seconds of each run.

    The runs alternate, so that a noisy machine disturbs all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            elapsed = _cuda_seconds(run) if CUDA else _cpu_seconds(run)
            if repeat >= 0:
                seconds[name].append(elapsed)
    return {name: median(values) for name, values in seconds.items()}


def for_each(function: Callable[[Any], object], values: Iterable[Any]) -> None:
    """Calls the function with each value."""
    for value in values:
        function(value)


def _cpu_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(run: Run) -> int:
    """Returns how far the memory allocated on the GPU rises during a run."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(run: Run, *, aside: Iterable[Tensor] = ()) -> int:
    """Returns the bytes that a forward pass saves for the backward pass.

    Every storage counts once. Parameters do not count, and neither do the tensors ``aside``, which exist anyway, such
    as the inputs.
    """
    excluded = {tensor.untyped_storage() for tensor in aside}
    storages: set[torch.UntypedStorage] = set()  # keeps them alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base  # a linear layer saves a view of its weight
        if not isinstance(owner, nn.Parameter):
            storages.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in storages - excluded)


def count_flops(run: Run) -> int:
    """Returns the FLOPs of a run. A multiply-add is 2.

    Attention runs under the MATH backend: the fused kernel for CPUs would count as zero.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
