"""Memory of attention against the image's edge: keypoints, windows, and all pixels (Figure 5 of the paper).

python benchmarks/memory.py [--edges 128 256 ...] [--attentions 20 100] [--spatial-dims 3]

Counts what the forward pass saves for the backward pass. Where there is a GPU, also measures there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import figure
import torch
from harness import compare, report, saved_bytes
from networks import NETWORKS, Network, backward
from sweep import parse, sweep
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

NOTES = """MB (10^6 bytes) in float32 for one image of edge x edge pixels: what the forward pass saves for the backward
pass, every storage once, without parameters and the network's inputs. A forward pass alone saves nothing.

The inputs of the KAF layers and of global attention are the feature maps of the convolutional network around them (the
last rows of each part count its memory too), that of a Swin is the image. KAF layers and global attention use the
fused attention of torch, which saves no matrix of attention weights; MONAI's Swin saves them. KAF layers can do with
less: recompute=True saves only the inputs of each block."""

VOLUME_NOTES = """MB (10^6 bytes) in float32 for one volume of as many voxels along each axis, counted as for images
(memory.md). "Dense" diffuses over every voxel, as the paper's layer does, with the propagation block; compare it with
"the paper's block"."""

GPU_NOTES = """One image, float32, in one process, alternating. GB (10^9 bytes) are the peak above what the weights and
inputs take; ms are medians."""


def measure(network: Network, inputs: tuple[object, ...]) -> dict[str, float]:
    aside = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return {"saved for backward": saved_bytes(lambda: network(*inputs), aside=aside) / 1e6}


def measure_on_gpu(*, edges: Sequence[int], attentions: Sequence[int]) -> list[dict[str, object]]:
    """Peak memory and time of all networks, side by side."""
    rows: list[dict[str, object]] = []
    for count in attentions:
        with torch.device("cuda"):
            networks = {name: build(count) for name, build in NETWORKS.items()}
        for edge in tqdm(edges, desc=f"{count} attentions", unit="edge"):
            with torch.device("cuda"):
                steps = {name: training_step(network, edge) for name, network in networks.items()}
            peaks = {name: peak_bytes(step) for name, step in steps.items()}
            fitting = {name: step for name, step in steps.items() if peaks[name] is not None}
            seconds = compare(fitting)
            for name, network in networks.items():
                fits = name in fitting
                row: dict[str, object] = {"network": name, "attentions": count, "edge": edge}
                row["GB"] = peaks[name] / 1e9 if fits else "out of memory"
                row["ms"] = 1e3 * seconds[name] if fits else ""
                rows.append(row | {"configuration": network.configuration})
    return rows


def training_step(network: Network, edge: int) -> Callable[[], None]:
    inputs = network.inputs(edge)
    return lambda: backward(network(*inputs))


def peak_bytes(step: Callable[[], None]) -> int | None:
    """The peak of allocated memory above what there is before the step, or None if it does not fit."""
    try:
        step()  # gradients are allocated here
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(__doc__, arguments)
    rows = sweep(measure, edges=options.edges, attentions=options.attentions, spatial_dims=options.spatial_dims)
    if options.spatial_dims == 3:
        report("memory-3d", rows, notes=VOLUME_NOTES, packages=("monai",), measured=False)
        return
    report("memory", rows, notes=NOTES, packages=("monai",), measured=False)
    figure.draw()
    if torch.cuda.is_available():
        rows = measure_on_gpu(edges=options.edges, attentions=options.attentions)
        report("attention", rows, notes=GPU_NOTES, packages=("monai",))


if __name__ == "__main__":
    main()
