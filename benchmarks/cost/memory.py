"""Counts memory of attention between keypoints, in windows and between all pixels (Figure 5 of the paper).

python benchmarks/memory.py [--edges 128 256 ...] [--attentions 20 100] [--spatial-dims 3] [--publish]

This is what the forward pass saves for the backward pass. benchmarks.speed.gpu measures peak memory on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.common.measuring import saved_bytes
from benchmarks.common.networks import Network
from benchmarks.cost.sweep import run

NOTES = """MB (10^6 bytes) that the forward pass saves for the backward pass, in float32, for one image of edge x edge
pixels. Every storage counts once. Parameters and the network's inputs do not count. Inference saves nothing.

The inputs of KAF layers and of global attention are feature maps of the convolutional network around them. The last row
of each part counts the memory of that network as well. The input of a Swin is the image. KAF layers and global
attention use torch's fused attention, which saves no matrix of attention weights. MONAI's Swin saves them. KAF layers
with recompute=True save less: only the inputs of each block."""

VOLUME_NOTES = """MB (10^6 bytes) in float32 for one volume with the given number of voxels along each axis, counted as
for images (memory.md). "Dense" diffuses over every voxel, as the paper's layer does, and has the propagation block;
compare it with "the paper's block"."""


def measure(network: Network, inputs: tuple[object, ...]) -> dict[str, float]:
    aside = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return {"saved for backward": saved_bytes(lambda: network(*inputs), aside=aside) / 1e6}


def main(arguments: Sequence[str] | None = None) -> None:
    notes = {2: NOTES, 3: VOLUME_NOTES}
    run(measure, name="memory", notes=notes, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
