"""Runs a training step in three precisions and three ways: eager, compiled, and recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.common import measuring
from benchmarks.common.harness import Row
from benchmarks.common.measuring import CUDA, DEVICE, Run, compare
from benchmarks.common.networks import backward
from kaf_layer import KAFEncoderOutput

PRECISIONS = ("float32", "TF32", "bfloat16")
WAYS = ("eager", "compiled", "graphed")
Case = tuple[nn.Module, tuple[Any, ...]]  # a network, which returns one map or a list of maps, and its inputs


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Runs matrix products and convolutions in float32 or TF32, or everything under autocast in bfloat16."""
    torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "TF32"
    try:
        # No cache: weights converted before a graph is recorded would not be converted again when it is replayed.
        with torch.autocast(DEVICE, torch.bfloat16, enabled=name == "bfloat16", cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True  # torch's defaults


def training_step(network: Callable[..., Any], inputs: tuple[Any, ...], *, dtype: str) -> Run:
    """Returns a function that runs the forward and the backward pass."""

    def step() -> None:
        with precision(dtype):
            maps = network(*inputs)
            maps = maps.features if isinstance(maps, KAFEncoderOutput) else maps
            backward(maps if isinstance(maps, list) else [maps])

    return step


def in_way(case: Case, way: str, *, dtype: str) -> Run:
    network, inputs = case
    if way == "compiled":
        # Without a GPU no kernels are compiled, because that takes minutes.
        compiled = torch.compile(network, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
        return training_step(compiled, inputs, dtype=dtype)
    step = training_step(network, inputs, dtype=dtype)
    return record(step) if way == "graphed" else step


def record(step: Run) -> Run:
    """Records the step as a CUDA graph, which launches all kernels at once. Without a GPU, returns the step itself."""
    if not CUDA:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch.cuda.graph requires that all lazy allocations are done before
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_bytes(step: Run) -> int | None:
    """Returns the peak of allocated memory above that before the step, or None if the step does not fit."""
    if not CUDA:
        step()
        return 0
    try:
        step()  # allocates the gradients
        return measuring.peak_bytes(step)
    except torch.OutOfMemoryError:
        return None


def side_by_side(cases: dict[str, Case], *, dtype: str, ways: Sequence[str], repeats: int = 11) -> Iterator[Row]:
    """Yields a row for each case and way: milliseconds, their ratio to the first case's, and the eager step's peak."""
    torch._dynamo.reset()
    peaks = {name: peak_bytes(in_way(case, "eager", dtype=dtype)) for name, case in cases.items()}
    for way in ways:
        steps = {name: in_way(case, way, dtype=dtype) for name, case in cases.items() if peaks[name] is not None}
        seconds = compare(steps, repeats=repeats)
        first = seconds.get(next(iter(cases)))
        for name in cases:
            fits, peak = name in seconds, peaks[name]
            yield {
                "network": name,
                "precision": dtype,
                "way": way,
                "ms": 1e3 * seconds[name] if fits else "out of memory",
                "times the first": seconds[name] / first if fits and first else "",
                "GB": "" if peak is None else peak / 1e9,
            }
