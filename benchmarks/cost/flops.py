"""GFLOPs of attention against the image's edge: keypoints, windows, and all pixels (Figure 5 of the paper).

python benchmarks/flops.py [--edges 128 256 ...] [--attentions 20 100] [--spatial-dims 3] [--publish]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.common.harness import count_flops, report
from benchmarks.common.networks import Network, backward
from benchmarks.cost import figure
from benchmarks.cost.sweep import parse, sweep

NOTES = """GFLOPs for one image of edge x edge pixels; a multiply-add counts as 2. Matrix products and convolutions
are counted, those within attention too (torch's counter under the MATH backend), and what is computed again in the
backward pass. Gathering, scattering, normalisation and softmax are not counted: they multiply no matrices, and cost
memory traffic.

KAF layers are added to a convolutional network, which the last row of each part counts too. A Swin is a complete
encoder. Detecting the keypoints is not counted; detection.py times it. Blocks are spread evenly over KAF's scales and
SwinUNETR's stages. Swin-T grows in its third stage, as its authors' larger networks do; a block costs about the same in
every stage of a Swin. Windows of 7 pixels need padding in most stages at these edges, but not at multiples of 224."""


VOLUME_NOTES = """GFLOPs for one volume with the given number of voxels along each axis, counted as for images
(flops.md). "Dense" diffuses over every voxel, as the paper's layer does, with the propagation block; compare it with
"the paper's block". KAF layers are added to a convolutional network, which the last rows count too. A Swin is a
complete encoder. Windows of 7 voxels need padding at these edges: 64 voxels are 32 patches, padded to 35."""


def measure(network: Network, inputs: tuple[object, ...]) -> dict[str, float]:
    features: list[Tensor] = []
    forward = count_flops(lambda: features.extend(network(*inputs)))
    both = forward + count_flops(lambda: backward(features))
    return {"forward": forward / 1e9, "forward+backward": both / 1e9}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(__doc__, arguments)
    rows = sweep(measure, edges=options.edges, attentions=options.attentions, spatial_dims=options.spatial_dims)
    if options.spatial_dims == 3:
        report("flops-3d", rows, notes=VOLUME_NOTES, packages=("monai",), measured=False)
    else:
        report("flops", rows, notes=NOTES, packages=("monai",), measured=False)
        figure.draw()


if __name__ == "__main__":
    main()
