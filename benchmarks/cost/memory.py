"""Memory of attention against the image's edge: keypoints, windows, and all pixels (Figure 5 of the paper).

python benchmarks/memory.py [--edges 128 256 ...] [--attentions 20 100] [--spatial-dims 3] [--publish]

Counts what the forward pass saves for the backward pass; gpu.py measures peaks on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.common.harness import report, saved_bytes
from benchmarks.common.networks import Network
from benchmarks.cost import figure
from benchmarks.cost.sweep import parse, sweep

NOTES = """MB (10^6 bytes) in float32 for one image of edge x edge pixels: what the forward pass saves for the backward
pass. Every storage counts once; parameters and the network's inputs do not count. Inference saves nothing.

The inputs of the KAF layers and of global attention are feature maps of the convolutional network around them, whose
memory the last row of each part counts too. The input of a Swin is the image. KAF layers and global attention use
torch's fused attention, which saves no matrix of attention weights; MONAI's Swin saves them. KAF layers can save less:
with recompute=True they save only the inputs of each block."""

VOLUME_NOTES = """MB (10^6 bytes) in float32 for one volume of as many voxels along each axis, counted as for images
(memory.md). "Dense" diffuses over every voxel, as the paper's layer does, with the propagation block; compare it with
"the paper's block"."""


def measure(network: Network, inputs: tuple[object, ...]) -> dict[str, float]:
    aside = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return {"saved for backward": saved_bytes(lambda: network(*inputs), aside=aside) / 1e6}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(__doc__, arguments)
    rows = sweep(measure, edges=options.edges, attentions=options.attentions, spatial_dims=options.spatial_dims)
    if options.spatial_dims == 3:
        report("memory-3d", rows, notes=VOLUME_NOTES, packages=("monai",), measured=False)
    else:
        report("memory", rows, notes=NOTES, packages=("monai",), measured=False)
        figure.draw()


if __name__ == "__main__":
    main()
