"""SuperPoint (DeTone et al., "SuperPoint: self-supervised interest point detection and description", 2018).

The detector that the KAF paper compares with SIFT, written from its paper. It has no weights of its own:

    detector = SuperPoint()
    detector.load_state_dict(torch.load("superpoint_v1.pth", weights_only=True))
    keypoints = detector(images)
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaf_layer import Keypoints

CELL = 8  # the pixels to a side of a cell, in which at most one pixel is a keypoint


class SuperPoint(nn.Module):
    """Detects keypoints in images (B, C, H, W) of any range, with one channel or RGB.

    The keypoints are in descending order of their scores. They have no gradients.

    The names of its layers are those of the published weights, from ``conv1a.weight`` to ``convDb.bias``.

    Args:
        max_keypoints: slots of an image, for its strongest keypoints.
        threshold: the probability that a keypoint must exceed.
        radius: pixels along each axis within which a keypoint suppresses weaker ones, as in the paper's experiments.
    """

    def __init__(self, max_keypoints: int = 512, *, threshold: float = 0.015, radius: int = 4) -> None:
        super().__init__()
        self.max_keypoints, self.threshold, self.radius = max_keypoints, threshold, radius
        widths = (1, 64, 64, 128, 128)
        for level, (before, width) in enumerate(pairwise(widths), start=1):
            self.add_module(f"conv{level}a", nn.Conv2d(before, width, 3, padding=1))
            self.add_module(f"conv{level}b", nn.Conv2d(width, width, 3, padding=1))
        self.convPa, self.convPb = nn.Conv2d(128, 256, 3, padding=1), nn.Conv2d(256, CELL**2 + 1, 1)
        self.convDa, self.convDb = nn.Conv2d(128, 256, 3, padding=1), nn.Conv2d(256, 256, 1)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Keypoints:
        """Keypoints with ``max_keypoints`` slots for each image, scores, and descriptors (B, N, 256) of length 1."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (B, 1, H, W) or (B, 3, H, W), got {images.shape=}")
        height, width = images.shape[2:]
        grey = images.float().mean(dim=1, keepdim=True)
        low, high = grey.amin((1, 2, 3), keepdim=True), grey.amax((1, 2, 3), keepdim=True)
        grey = (grey - low) / (high - low).clamp(min=1e-6)
        padded = F.pad(grey, (0, -width % CELL, 0, -height % CELL), mode="replicate")
        # Image by image, which needs less memory.
        heatmap, descriptors = map(torch.cat, zip(*(self.maps(image) for image in padded.split(1)), strict=True))
        scores = suppress(heatmap[:, :height, :width], self.radius).flatten(1)
        scores = F.pad(scores, (0, max(0, self.max_keypoints - scores.shape[1])))
        strongest, pixels = scores.topk(self.max_keypoints)
        valid = strongest > self.threshold
        positions = torch.stack([pixels % width, pixels // width], dim=-1).where(valid[..., None], 0).float()
        found = describe(descriptors, positions)
        return Keypoints(positions, valid, (height, width), scores=strongest, descriptors=found)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The probability of a keypoint at each pixel (B, H, W), and descriptors (B, 256, H / 8, W / 8)."""
        x = images
        for level in range(1, 5):
            x = self.get_submodule(f"conv{level}a")(x).relu()
            x = self.get_submodule(f"conv{level}b")(x).relu()
            x = F.max_pool2d(x, 2) if level < 4 else x
        # The last of the 65 channels is the probability that the cell has no keypoint.
        cells = self.convPb(self.convPa(x).relu()).softmax(dim=1)[:, :-1]
        return F.pixel_shuffle(cells, CELL)[:, 0], self.convDb(self.convDa(x).relu())


def suppress(heatmap: Tensor, radius: int) -> Tensor:
    """Non-maximum suppression of (B, H, W): keeps the strongest pixel, sets its neighbours to 0, and so on.

    Each round keeps all pixels that are the strongest in their neighbourhoods. Of equal pixels it keeps the first.
    """
    order = heatmap.flatten(1).argsort(dim=1, stable=True, descending=True).argsort(dim=1)
    rank = (order.shape[1] - order).view_as(heatmap).float()  # from 1: no two pixels are equal

    def largest(values: Tensor) -> Tensor:
        return F.max_pool2d(values, 2 * radius + 1, stride=1, padding=radius)

    undecided, kept = torch.ones_like(rank), torch.zeros_like(rank)
    while undecided.any():
        left = rank * undecided
        maxima = (left == largest(left)) & (undecided > 0)
        kept = kept + maxima
        undecided = undecided * (1 - largest(maxima.float()))
    return heatmap * kept


def describe(descriptors: Tensor, positions: Tensor) -> Tensor:
    """Descriptors (B, N, C) at positions (B, N, 2) in pixels, interpolated by cubic splines and scaled to length 1."""
    sizes = positions.new_tensor([descriptors.shape[3], descriptors.shape[2]]) * CELL
    grid = (positions + 0.5) / sizes * 2 - 1
    sampled = F.grid_sample(descriptors, grid[:, None], mode="bicubic", padding_mode="border", align_corners=False)
    return F.normalize(sampled[:, :, 0].mT, dim=2)
