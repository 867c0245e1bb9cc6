"""A task that needs distance and nothing else: the brightness of a distant ring determines the class of a blob.

Each image has a dark blob, the target, of class 0 or 1. It has one ring, the marker, which is dark for class 0 and
bright for class 1. It also has bright blobs that mean nothing. Nothing near the target shows its class, so a network
whose receptive field does not reach the marker can only guess.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kaf_layer import Keypoints, SIFTDetector

EDGE = 128
RADIUS = 6  # of the labelled disc: two standard deviations of a blob
MARGIN = 20  # from a centre to the image's border
NEAREST, FARTHEST = 16, 100  # the distances between target and marker
IGNORED = -1  # the label of pixels that do not count


@dataclass
class Task:
    """Images (B, 1, H, W), labels (B, H, W), IGNORED outside of the target, distances (B,) and keypoints."""

    images: Tensor
    labels: Tensor
    distances: Tensor
    keypoints: Keypoints

    def __getitem__(self, index: Tensor | slice) -> Task:
        return Task(self.images[index], self.labels[index], self.distances[index], self.keypoints[index])


def draw_task(count: int, *, seed: int, distractors: int = 3) -> Task:
    """Draws images with SIFT keypoints. Directions are uniform; distances are uniform if they fit in the image."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(EDGE), torch.arange(EDGE), indexing="ij")
    noise = F.avg_pool2d(torch.randn(count, 1, EDGE + 2, EDGE + 2, generator=generator), 3, 1)
    images, labels = 0.1 * noise, torch.full((count, EDGE, EDGE), IGNORED)
    distances = torch.empty(count)
    for i in range(count):
        kind = int(torch.randint(2, (), generator=generator))
        target, marker, *others = place_blobs(distractors, generator)
        distances[i] = math.dist(target, marker)
        radius = [torch.hypot(x - x0, y - y0) for x0, y0 in (target, marker, *others)]
        blobs = [2 * (-((r / 3) ** 2) / 2).exp() for r in radius]
        ring = blobs[1] - 2 * (-((radius[1] / 1.5) ** 2) / 2).exp()
        images[i, 0] += sum(blobs[2:]) - blobs[0] + (2 * kind - 1) * ring
        labels[i][radius[0] <= RADIUS] = kind
    detector = SIFTDetector(64, descriptors=False)
    parts = [detector(part) for part in images.split(50)]
    keypoints = Keypoints.stack([part[i] for part in parts for i in range(len(part))])
    return Task(images, labels, distances, keypoints)


def place_blobs(distractors: int, generator: torch.Generator) -> list[tuple[float, float]]:
    """Draws centres of target, marker and distractors, no two of which touch."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    low, high = MARGIN, EDGE - 1.0 - MARGIN
    while True:
        distance, direction = draw(NEAREST, FARTHEST), draw(0, 2 * math.pi)
        target = draw(low, high), draw(low, high)
        marker = target[0] + distance * math.cos(direction), target[1] + distance * math.sin(direction)
        if not all(low <= value <= high for value in marker):
            continue
        places = [target, marker, *((draw(low, high), draw(low, high)) for _ in range(distractors))]
        pairs = ((a, b) for i, a in enumerate(places) for b in places[:i])
        if all(math.dist(a, b) >= NEAREST for a, b in pairs):
            return places
