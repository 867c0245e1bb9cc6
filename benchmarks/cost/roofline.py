"""Estimates kernels, FLOPs, bytes and the least time of a training step on a GPU.

python -m benchmarks.cost.roofline [--card H100] [--compiled]

This measures nothing and needs no GPU: the tensors are on the device "meta", where they have shapes and no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import get_args

import torch
from torch import Tensor

from benchmarks.common.harness import parser, report
from benchmarks.cost.kernels import CARDS, Card, Kernel, count, floor
from examples.unet import KAFUNet
from kaf_layer import KAFLayer, KAFPretrainingLoss, KeypointDiffusion, Keypoints, SIFTDetector, match_keypoints
from kaf_layer.diffusion.network import Method, cheapest_method
from kaf_layer.matching import log_sinkhorn

BATCH, EDGE, POINTS, WIDTH, DEPTH = 8, 512, 500, 32, 6
HALF = torch.bfloat16
Passes = dict[str, list[Kernel]]


def keypoints(device: str, batch: int = BATCH) -> Keypoints:
    valid = torch.ones(batch, POINTS, dtype=torch.bool, device=device)
    descriptors = torch.zeros(batch, POINTS, 128, device=device)
    return Keypoints(torch.zeros(batch, POINTS, 2, device=device), valid, (EDGE, EDGE), descriptors=descriptors)


def both(run: Callable[[], Sequence[Tensor]], *, dtype: torch.dtype | None = None) -> Passes:
    """Returns the kernels of a forward pass, and of the backward pass from gradients of all results."""
    results: list[Tensor] = []
    forward, waits = count(lambda: results.extend(run()), dtype=dtype)
    gradients = [torch.ones_like(result) for result in results]
    backward, more = count(lambda: torch.autograd.backward(results, gradients), dtype=dtype)
    if waits or more:
        raise RuntimeError(f"these calls wait for the GPU: {[*waits, *more]}")
    return {"forward": forward, "backward": backward}


def layer(scale: int, device: str) -> tuple[KAFLayer, Tensor]:
    channels, edge = WIDTH * 2**scale, EDGE // 2**scale
    with torch.device(device):
        return KAFLayer(channels, depth=DEPTH), torch.empty(BATCH, channels, edge, edge, requires_grad=True)


def eager_layer(scale: int) -> Passes:
    module, features = layer(scale, "meta")
    return both(lambda: module(features, keypoints("meta")), dtype=HALF)


def compiled_layer(scale: int) -> Passes:
    from benchmarks.cost.planned import Schedule

    module, features = layer(scale, "cpu")
    # It is planned on a CPU, but in the way that a GPU takes.
    module.diffusion.method = cheapest_method(POINTS, features.shape[2:], device="cuda", dtype=HALF)
    schedule = Schedule()
    torch.compiler.reset()
    with torch.autocast("cpu", HALF):
        results = torch.compile(module, fullgraph=True, backend=schedule)(features, keypoints("cpu"))
    sum(result.sum() for result in results).backward()
    return dict(zip(("forward", "backward"), schedule.kernels, strict=True))


def diffusion(edge: int, method: Method, slots: int = POINTS) -> Passes:
    """One of the ways to compute the diffusion of the KAF-UNet's layer on a map."""
    channels = WIDTH * EDGE // edge
    with torch.device("meta"):
        module = KeypointDiffusion(256, channels)
        module.method = method
        tokens = torch.empty(BATCH, slots, 256, dtype=HALF, requires_grad=True)
        features = torch.empty(BATCH, channels, edge, edge, dtype=HALF, requires_grad=True)
        points = Keypoints(torch.zeros(BATCH, slots, 2), torch.ones(BATCH, slots, dtype=torch.bool), (edge, edge))
    return both(lambda: [module(tokens, points, (edge, edge), features=features)], dtype=HALF)


def network() -> Passes:
    with torch.device("meta"):
        model, images = KAFUNet(width=WIDTH, depth=DEPTH), torch.empty(BATCH, 1, EDGE, EDGE)
    return both(lambda: [model(images, keypoints("meta"))], dtype=HALF)


def detector() -> Passes:
    with torch.no_grad():
        kernels, _ = count(lambda: SIFTDetector(POINTS)(torch.empty(BATCH, 1, EDGE, EDGE, device="meta")))
    return {"forward": kernels}


def transport() -> Passes:
    scores = torch.empty(BATCH, POINTS, POINTS, device="meta", requires_grad=True)
    return both(lambda: [log_sinkhorn(scores, torch.empty((), device="meta"))])


def losses() -> Passes:
    with torch.device("meta"):
        loss = KAFPretrainingLoss(16 * WIDTH, 256)
        bottleneck = torch.empty(BATCH, 16 * WIDTH, EDGE // 16, EDGE // 16, requires_grad=True)
        tokens = torch.empty(BATCH, POINTS, 256, requires_grad=True)
        positions, half = torch.empty(BATCH), keypoints("meta", BATCH // 2)
    matches, _ = count(lambda: match_keypoints(half, half))
    found = match_keypoints(half, half)
    passes = both(lambda: [loss(bottleneck, positions, tokens, keypoints("meta"), found).total], dtype=HALF)
    return passes | {"forward": matches + passes["forward"]}


def rows(*, compiled: bool, chosen: Card) -> Iterator[dict[str, object]]:
    cases: dict[str, Callable[[], Passes]] = {}
    for scale in range(4):
        title = f"layer, a map of {EDGE // 2**scale}x{EDGE // 2**scale}, {WIDTH * 2**scale} channels"
        cases[title] = partial(eager_layer, scale)
        if compiled:
            cases[f"{title}, compiled"] = partial(compiled_layer, scale)
    for edge, method in product((EDGE, EDGE // 4, EDGE // 8), get_args(Method)):
        cases[f"diffusion on a map of {edge}x{edge}, `{method}`"] = partial(diffusion, edge, method)
    cases |= {
        "KAF-UNet": network,
        "`SIFTDetector`, float32": detector,
        "`log_sinkhorn`, 100 iterations, float32": transport,
        "`KAFPretrainingLoss` and `match_keypoints`": losses,
    }
    for title, case in cases.items():
        for part, kernels in case().items():
            yield {
                "what": title,
                "pass": part,
                "kernels": len(kernels),
                "GFLOPs": "" if title.endswith("compiled") else sum(kernel.flops for kernel in kernels) / 1e9,
                "GB": sum(kernel.bytes for kernel in kernels) / 1e9,
                "ms at least": 1e3 * floor(kernels, chosen),
            }


NOTES = f"""An estimate without a GPU, not a measurement.
{BATCH} images of {EDGE}x{EDGE} pixels, {POINTS} keypoints, depth {DEPTH}, bfloat16 by autocast except where a row says
float32. Kernels: one for each operation that is not a view; some, such as sorting, take more. Bytes: each operand is
read once and each result is written once. A multiply-add is 2 FLOPs. ms at least: for each kernel the longest of 3
microseconds, the time for its bytes and the time for its FLOPs, at three quarters of the data sheet's rates (CARD).
Compiled: the kernels that inductor plans for a CPU, with a GPU's rules for concatenations and for sums at indices; the
time of their arithmetic is left out."""


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("--card", choices=CARDS, default="H100", help="GPU to estimate for")
    own.add_argument("--compiled", action="store_true", help="also plan kernels of compiled layers: a minute for each")
    options = own.parse_args(arguments)
    table = rows(compiled=options.compiled, chosen=CARDS[options.card])
    report(
        f"roofline-{options.card.replace(' ', '-')}", table, notes=NOTES.replace("CARD", options.card), measured=False
    )


if __name__ == "__main__":
    main()
