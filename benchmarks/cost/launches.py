"""How many operations a layer, the detector and Sinkhorn's iterations issue: on a GPU each is at least one kernel.

python -m benchmarks.cost.launches [--names] [--compiled]
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
from kaf_layer import KAFLayer, Keypoints, SIFTDetector
from kaf_layer.matching import log_sinkhorn, sinkhorn

NOTES = """Operations that PyTorch dispatches, without those that launch nothing: views, and allocations that are not
filled. Counted in double precision on the CPU. A KAFLayer of depth 6 for 32 channels, two images, 500
keypoints, of which some slots are padded. The detector searches both images at once, with shapes that do not
depend on what it finds, as off the CPU."""
COMPILED_NOTES = """
Compiled: what the program that torch.compile writes calls, its own fused loops and routines of libraries."""
CALL = re.compile(r"(?:extern_kernels\.\w+|torch\.ops\.[\w.]+|cpp_fused\w*|triton_\w+\.run)\(")

EDGES = 512, 64
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
NOTHING |= {"promote_types", "scalar_tensor"}  # on the CPU, wherever the operands are


class Launches(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not launches_nothing(func):
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def launches_nothing(func: Any) -> bool:
    """Whether an operation is a view, or leaves its result unfilled."""
    returned = func._schema.returns
    view = any(value.alias_info is not None and not value.alias_info.is_write for value in returned)
    return view or func.overloadpacket.__name__ in NOTHING


def count(run: Callable[[], Any]) -> Counter[str]:
    with Launches() as launches:
        run()
    return launches.names


def inputs(edge: int) -> tuple[Tensor, Keypoints]:
    valid = torch.ones(2, 500, dtype=torch.bool)
    valid[1, 400:] = False
    keypoints = Keypoints(torch.rand(2, 500, 2).double() * edge, valid, (edge, edge))
    return torch.rand(2, 32, edge, edge, dtype=torch.float64, requires_grad=True), keypoints


def layer_launches(edge: int) -> dict[str, Counter[str]]:
    """Of a forward and a backward pass at edge x edge pixels."""
    layer = KAFLayer(32, depth=6).double()
    features, keypoints = inputs(edge)
    results: list[Tensor] = []
    forward = count(lambda: results.extend(layer(features, keypoints)))
    gradients = [torch.ones_like(result) for result in results]
    return {"forward": forward, "backward": count(lambda: torch.autograd.backward(results, gradients))}


def compiled_calls(edge: int, *, depth: int = 6) -> dict[str, int]:
    """How much the compiled programs of both passes call."""
    torch.compiler.reset()
    layer = torch.compile(KAFLayer(32, depth=depth).double(), fullgraph=True)
    features, keypoints = inputs(edge)
    # The program for the backward pass is written when it is first run.
    _, programs = run_and_get_code(lambda: sum(result.sum() for result in layer(features, keypoints)).backward())
    calls = [len(CALL.findall(program.partition("def call")[2])) for program in programs]
    return dict(zip(("forward, compiled", "backward, compiled"), calls, strict=True))


def detect(images: Tensor) -> Keypoints:
    """The way that the detector takes off the CPU and under a compiler, where shapes may not depend on values."""
    with patch("torch.compiler.is_compiling", lambda: True):
        return SIFTDetector(500)(images)


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("--names", action="store_true", help="print how often each operation is issued")
    own.add_argument("--compiled", action="store_true", help="count the kernels of a compiled layer too; needs g++")
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
    # Sinkhorn's iterations are one operator: its function is put in its place, so that what it issues is seen.
    with torch.no_grad(), patch.object(sinkhorn, "_sinkhorn", sinkhorn._sinkhorn._init_fn):
        empty = dict.fromkeys(rows[0], "")
        rows += [empty | {"": title, "forward": count(run).total()} for title, run in singles.items()]
    notes = NOTES + COMPILED_NOTES if options.compiled else NOTES
    report("launches", rows, notes=notes, measured=False)


if __name__ == "__main__":
    main()
