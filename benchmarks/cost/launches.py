"""Counts the operations that a layer, the detector and Sinkhorn's iterations issue.

python -m benchmarks.cost.launches [--names] [--compiled]

On a GPU each operation launches at least one kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.harness import parser, report
from benchmarks.cost.kernels import launches_nothing
from kaf_layer import KAFLayer, Keypoints, SIFTDetector
from kaf_layer.matching import log_sinkhorn, sinkhorn
from kaf_layer.positions import PositionType

NOTES = """Operations that PyTorch dispatches, without those that launch nothing: views, and allocations that are not
filled. They are counted in double precision on the CPU, for a KAFLayer of depth 6 and 32 channels, two images and 500
keypoints, of which some slots are padding. The detector searches both images at once, with shapes that do not depend on
what it finds, as it does on a GPU."""
COMPILED_NOTES = """
Compiled: calls in the program that torch.compile writes, to its own fused loops and to libraries."""
CALL = re.compile(r"(?:extern_kernels\.\w+|torch\.ops\.[\w.]+|cpp_fused\w*|triton_\w+\.run)\(")

EDGES = 512, 64


class Launches(TorchDispatchMode):
    """Counts operations by name, without those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not launches_nothing(func):
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> Counter[str]:
    with Launches() as launches:
        run()
    return launches.names


def inputs(edge: int) -> tuple[Tensor, Keypoints]:
    valid = torch.ones(2, 500, dtype=torch.bool)
    valid[1, 400:] = False
    keypoints = Keypoints(torch.rand(2, 500, 2).double() * edge, valid, (edge, edge))
    return torch.rand(2, 32, edge, edge, dtype=torch.float64, requires_grad=True), keypoints


def layer_launches(edge: int, *, position: PositionType | None = None) -> dict[str, Counter[str]]:
    """Counts the operations of a forward and of a backward pass on edge x edge pixels."""
    layer = KAFLayer(32, depth=6, position=position).double()
    features, keypoints = inputs(edge)
    results: list[Tensor] = []
    forward = count(lambda: results.extend(layer(features, keypoints)))
    gradients = [torch.ones_like(result) for result in results]
    return {"forward": forward, "backward": count(lambda: torch.autograd.backward(results, gradients))}


def compiled_calls(edge: int, *, depth: int = 6, position: PositionType | None = None) -> dict[str, int]:
    """Counts the calls in the compiled programs of both passes."""
    torch.compiler.reset()
    layer = torch.compile(KAFLayer(32, depth=depth, position=position).double(), fullgraph=True)
    features, keypoints = inputs(edge)
    # The program for the backward pass is written when that pass first runs.
    _, programs = run_and_get_code(lambda: sum(result.sum() for result in layer(features, keypoints)).backward())
    calls = [len(CALL.findall(program.partition("def call")[2])) for program in programs]
    return dict(zip(("forward, compiled", "backward, compiled"), calls, strict=True))


def detect(images: Tensor) -> Keypoints:
    """Detects as on a GPU and under a compiler, where shapes may not depend on values."""
    with patch("torch.compiler.is_compiling", lambda: True):
        return SIFTDetector(500)(images)


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("--names", action="store_true", help="also print how often each operation is issued")
    own.add_argument("--compiled", action="store_true", help="also count the kernels of a compiled layer; needs g++")
    options = own.parse_args(arguments)
    counts = {f"KAFLayer, {edge}x{edge}": layer_launches(edge) for edge in EDGES}
    for title, counters in counts.items() if options.names else ():
        for part, names in counters.items():
            print(title, part, dict(names.most_common()))
    rows: list[dict[str, object]] = [
        {"": title, **{part: names.total() for part, names in counters.items()}} for title, counters in counts.items()
    ]
    for row, edge in zip(rows, EDGES if options.compiled else (), strict=False):
        row.update(compiled_calls(edge))
    images = torch.rand(2, 1, 128, 96, dtype=torch.float64)
    scores, dustbin = torch.rand(2, 100, 90, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    singles = {
        "SIFTDetector": lambda: detect(images),
        "log_sinkhorn, 100 iterations": lambda: log_sinkhorn(scores, dustbin, iterations=100),
    }
    # Sinkhorn's iterations are one operator. Its function replaces it here, so that its operations are counted.
    with torch.no_grad(), patch.object(sinkhorn, "_sinkhorn", sinkhorn._sinkhorn._init_fn):
        empty = dict.fromkeys(rows[0], "")
        rows += [empty | {"": title, "forward": count(run).total()} for title, run in singles.items()]
    notes = NOTES + COMPILED_NOTES if options.compiled else NOTES
    report("launches", rows, notes=notes, measured=False)


if __name__ == "__main__":
    main()
