"""Counts GFLOPs of attention between keypoints, in windows and between all pixels (Figure 5 of the paper).

python benchmarks/flops.py [--edges 128 256 ...] [--attentions 20 100] [--spatial-dims 3] [--publish]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.common.measuring import count_flops
from benchmarks.common.networks import Network, backward
from benchmarks.cost.sweep import run

NOTES = """GFLOPs for one image of edge x edge pixels. A multiply-add counts as 2. Matrix products and convolutions are
counted, including those within attention (by torch's counter under the MATH backend) and those that the backward pass
computes again. Gathering, scattering, normalisation and softmax are not counted: they multiply no matrices, and their
cost is memory traffic.

KAF layers are added to a convolutional network. The last row of each part counts that network as well. A Swin is a
complete encoder. The detection of keypoints is not counted; benchmarks.detection.images measures its time. Blocks are
spread evenly over KAF's scales and SwinUNETR's stages. Swin-T grows in its third stage, like its authors' larger
networks; a block costs about the same in every stage of a Swin. At these edges, windows of 7 pixels need padding in
most stages. At multiples of 224 they need none."""

VOLUME_NOTES = """GFLOPs for one volume with the given number of voxels along each axis, counted as for images
(flops.md). "Dense" diffuses over every voxel, as the paper's layer does, and has the propagation block; compare it with
"the paper's block". KAF layers are added to a convolutional network, which the last rows count as well. A Swin is a
complete encoder. Windows of 7 voxels need padding at these edges: 64 voxels are 32 patches, which are padded to 35."""


def measure(network: Network, inputs: tuple[object, ...]) -> dict[str, float]:
    features: list[Tensor] = []
    forward = count_flops(lambda: features.extend(network(*inputs)))
    both = forward + count_flops(lambda: backward(features))
    return {"forward": forward / 1e9, "forward+backward": both / 1e9}


def main(arguments: Sequence[str] | None = None) -> None:
    notes = {2: NOTES, 3: VOLUME_NOTES}
    run(measure, name="flops", notes=notes, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
