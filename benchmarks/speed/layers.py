"""Measures how much faster the KAF layer is than the paper's in plain PyTorch, and how much less it saves and computes.

python -m benchmarks.speed.layers [--parts diffusion stack flops network] [--edges 512 256 ...] [--repeats 11]
python -m benchmarks.speed.layers --spatial-dims 3 [--parts diffusion stack] [--edges 64 96 128]  # volumes
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.harness import Row, parser, report
from benchmarks.common.measuring import CUDA, DEVICE, count_flops
from benchmarks.common.networks import SCALES, WIDTH
from benchmarks.speed.network_step import NOTES as NETWORK_NOTES
from benchmarks.speed.network_step import network_step
from benchmarks.speed.passes import measure, precision, random_keypoints
from benchmarks.speed.plain import PlainDiffusion, PlainKAFLayer
from benchmarks.speed.volume_stack import NOTES as STACK_NOTES_3D
from benchmarks.speed.volume_stack import volume_stack
from kaf_layer import KAFLayer, KeypointDiffusion
from kaf_layer.diffusion import cheapest_method

PARTS = "diffusion", "stack", "flops", "network"
QUANTITIES = "forward", "forward+backward", "saved", "FLOPs"
# The least ratios to reach, by the edge of the map in pixels, at 512 keypoints.
TARGETS = {512: (25, 40, 100, 250), 256: (7, 10, 25, 45), 128: (1.9, 2, 6.5, 8.5), 64: (1.2, 1.2, 1.9, 1)}
VOLUME_TARGETS = {64: (1, 1, 10, 20)}  # by the number of voxels along each axis

# From this size of the dense network's map of tokens on, its backward pass is not measured on a CPU.
SLOW_BYTES = 2**31

DIFFUSION_NOTES = """The diffusion network in training mode: ours against the paper's in plain PyTorch (tokens in a zero
map, Conv2d, BatchNorm2d, ReLU, Conv2d). The columns from "forward" on are ratios of plain to ours: of times (medians of
alternating runs), of the bytes saved for the backward pass, of FLOPs (forward) and, on a GPU, of peak memory. Each
keypoint is in a random cell of its own, which is the worst case for us. "missed" names the ratios that fall short of
the targets in benchmarks/speed/layers.py; with 2048 keypoints these are 0.95 for times and 1 for the rest."""

VOLUME_NOTES = """As diffusion.md, for the finest map of a volume, with 32 channels. The dense network takes seconds, so
there are few repetitions. "too slow": at 128x128x128 its map of tokens has 2 GiB, for which oneDNN has no fast backward
pass on a CPU; that pass was stopped after ten minutes."""

STACK_NOTES = """KAF layers on a UNet's four scales (32 to 256 channels at strides 1 to 8) in training mode. Ours have
propagation blocks, without and with recomputation in the backward pass. They are compared with the authors' design in
plain PyTorch (attention on two copies of the tokens by einsum, dense diffusion). By default there are one image of
512x512 pixels, 512 keypoints and 16 blocks in each layer."""

FLOPS_NOTES = """GFLOPs (forward) of KAF layers on four scales, with 512 keypoints and 6 transformer blocks each, and of
their attention alone."""


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def diffusion(dtype: torch.dtype, slots: int, batch: int, edge: int, *, repeats: int, spatial_dims: int = 2) -> Row:
    """Returns a row of the targets' table: ours against the plain diffusion network."""
    torch.manual_seed(0)
    channels, size = WIDTH if spatial_dims == 3 else WIDTH * 512 // edge, (edge,) * spatial_dims
    plain = PlainDiffusion(256, channels, spatial_dims=spatial_dims).to(DEVICE)
    ours = KeypointDiffusion(256, channels, spatial_dims=spatial_dims).to(DEVICE)
    ours.load_state_dict(plain.state_dict())
    keypoints = random_keypoints(batch, slots, edge, spatial_dims)
    tokens = torch.randn(batch, slots, 256, device=DEVICE, requires_grad=True)
    quantities = measure(
        {"plain": lambda: plain(tokens, keypoints, size), "ours": lambda: ours(tokens, keypoints, size)},
        [tokens, *plain.parameters(), *ours.parameters()],
        dtype=dtype,
        repeats=repeats,
        backward=CUDA or 4 * 256 * prod(size) < SLOW_BYTES,
    )
    row: Row = {
        "map": f"{'x'.join(map(str, size))}, {channels}",
        "keypoints": slots,
        "batch": batch,
        "dtype": name_of(dtype),
        "method": cheapest_method(slots, size, device=DEVICE, dtype=dtype),
        "ours, forward, ms": 1e3 * quantities["forward"]["ours"],
    }
    ratios = {name: values["plain"] / values["ours"] for name, values in quantities.items()}
    row |= {"forward": 0.0, "forward+backward": "too slow"} | ratios
    reached = TARGETS if spatial_dims == 2 else VOLUME_TARGETS
    targets = reached.get(edge, (0.0,) * 4) if slots == 512 else (0.95, 0.95, 1.0, 1.0)
    short = [name for name, target in zip(QUANTITIES, targets, strict=True) if ratios.get(name, target) < target]
    return row | {"missed": ", ".join(short) or "-"}


def maps(edge: int) -> list[Tensor]:
    sizes = [(1, WIDTH * 2**i, edge // 2**i, edge // 2**i) for i in range(SCALES)]
    return [torch.randn(size, device=DEVICE, requires_grad=True) for size in sizes]


def stack(dtype: torch.dtype, edge: int, *, depth: int, repeats: int) -> list[Row]:
    """Compares the KAF layers of all scales with the authors' design."""
    features, keypoints = maps(edge), random_keypoints(1, min(512, edge**2 // 64), edge)
    widths = [feature.shape[1] for feature in features]

    def ours(*, recompute: bool) -> nn.ModuleList:
        options: dict[str, Any] = {"block": "propagation", "sampling": "nearest", "depth": depth}
        return nn.ModuleList(KAFLayer(width, recompute=recompute, **options) for width in widths).to(DEVICE)

    def run(layers: nn.ModuleList) -> Tensor:
        outputs = [layer(x, keypoints) for layer, x in zip(layers, features, strict=True)]
        return torch.stack([(x if isinstance(x, Tensor) else x.features).float().mean() for x in outputs])

    stacks = {
        "plain": nn.ModuleList(PlainKAFLayer(width, depth=depth) for width in widths).to(DEVICE),
        "ours": ours(recompute=False),
        "ours, recomputing": ours(recompute=True),
    }
    inputs = [*features, *(parameter for layers in stacks.values() for parameter in layers.parameters())]
    forwards = {name: partial(run, layers) for name, layers in stacks.items()}
    quantities = measure(forwards, inputs, dtype=dtype, repeats=repeats)
    seconds = quantities["forward+backward"]
    rows = []
    for name in ("ours", "ours, recomputing"):
        row: Row = {"stack": name, "dtype": name_of(dtype)}
        row |= {quantity: values["plain"] / values[name] for quantity, values in quantities.items()}
        rows.append(row | {"time, of ours": seconds[name] / seconds["ours"]})
    return rows


def stack_flops(edge: int) -> Row:
    """Counts what a stack of KAF layers computes, and what its attention alone computes."""
    layers = [KAFLayer(WIDTH * 2**i).to(DEVICE) for i in range(SCALES)]
    features, keypoints = maps(edge), random_keypoints(1, 512, edge)
    tokens = torch.randn(1, 512, 256, device=DEVICE)
    whole = count_flops(lambda: [layer(x, keypoints) for layer, x in zip(layers, features, strict=True)])
    attention = count_flops(lambda: [layer.transformer(tokens, keypoints) for layer in layers])
    return {"image": f"{edge}x{edge}", "all": whole / 1e9, "attention": attention / 1e9, "ratio": whole / attention}


def network(dtype: torch.dtype, edge: int, *, repeats: int) -> Row:
    """Compares a training step of the KAF-UNet with that of UNet (c2)."""
    row = network_step(random_keypoints(2, 512, edge), precision(dtype), width=WIDTH, repeats=repeats)
    return {"image": f"{edge}x{edge}", "dtype": name_of(dtype)} | row


def volumes(parts: Sequence[str], edges: Sequence[int], dtypes: Sequence[torch.dtype], *, repeats: int) -> None:
    if "diffusion" in parts:
        cases = product(dtypes, (512,), (1,), edges)
        report("diffusion-3d", (diffusion(*c, repeats=repeats, spatial_dims=3) for c in cases), notes=VOLUME_NOTES)
    if "stack" in parts:
        rows = (row for edge in edges for row in volume_stack(edge, repeats=repeats, device=DEVICE))
        report("stack-3d", rows, notes=STACK_NOTES_3D, packages=["monai"])


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    own.add_argument("--edges", type=int, nargs="+", help="edges of the maps; the largest is also the image's")
    own.add_argument("--depth", type=int, default=16, help="blocks in each layer of the stack")
    own.add_argument("--repeats", type=int, default=11, help="how often each run is timed; the median counts")
    own.add_argument("--spatial-dims", type=int, choices=(2, 3), default=2, help="3: diffusion and stack of volumes")
    options = own.parse_args(arguments)
    dtypes = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
    usual = [512, 256, 128, 64] if options.spatial_dims == 2 else [64, 96, 128]
    edges, repeats = options.edges or usual, options.repeats
    if options.spatial_dims == 3:
        volumes(options.parts, edges, dtypes, repeats=repeats)
        return
    edge = max(edges)
    if "diffusion" in options.parts:
        cases = product(dtypes, (512, 2048), (1, 4), edges)
        report("diffusion", (diffusion(*case, repeats=repeats) for case in cases), notes=DIFFUSION_NOTES)
    if "stack" in options.parts:
        rows = (row for dtype in dtypes for row in stack(dtype, edge, depth=options.depth, repeats=repeats))
        report("stack", rows, notes=STACK_NOTES)
    if "flops" in options.parts:
        report("stack-flops", map(stack_flops, (edge, 2 * edge)), notes=FLOPS_NOTES, measured=False)
    if "network" in options.parts:
        steps = product(dtypes, (edge // 2, edge))
        report("network", (network(*step, repeats=repeats) for step in steps), notes=NETWORK_NOTES)


if __name__ == "__main__":
    main()
