"""OpenCV's SIFT as a KeypointDetector: on the CPU, image by image, for keypoints that are computed in advance.

python examples/opencv_sift.py image.png
"""

import argparse
import math

import cv2
import numpy as np
import torch
from torch import Tensor

from kaf_layer import Keypoints


class OpenCVSIFT:
    """Detects the same keypoints as ``SIFTDetector``, without gradients and faster on a CPU.

    Args:
        max_keypoints: how many keypoints an image keeps, the strongest first. OpenCV repeats a position
            for each of its orientations, and counts these.
        precise: double the image without OpenCV's quarter-pixel bias.
    """

    def __init__(self, max_keypoints: int = 512, *, precise: bool = True) -> None:
        # By position, since the names of these arguments changed between OpenCV 4 and 5.
        self.sift = cv2.SIFT_create(max_keypoints, 3, 0.04, 10, 1.6, precise)

    def __call__(self, images: Tensor) -> Keypoints:
        """The keypoints of images (B, C, H, W) of any range, with one channel or RGB, padded to the largest number."""
        return Keypoints.stack([self.detect(image) for image in images.detach().cpu()]).to(images.device)

    def detect(self, image: Tensor) -> Keypoints:
        """The keypoints of one image (C, H, W), without a batch axis."""
        array = image.float().movedim(0, -1).numpy()
        grey = array[..., 0] if len(image) == 1 else cv2.cvtColor(array, cv2.COLOR_RGB2GRAY)
        grey = cv2.normalize(grey, None, 0, 255, cv2.NORM_MINMAX).round().astype(np.uint8)
        found, descriptors = self.sift.detectAndCompute(grey, None)
        order = sorted(range(len(found)), key=lambda i: -found[i].response)
        table = [(*found[i].pt, found[i].response, found[i].size / 2, math.radians(found[i].angle)) for i in order]
        x, y, scores, scales, angles = torch.tensor(table, dtype=torch.float32).reshape(-1, 5).unbind(1)
        histograms = np.zeros((0, 128), np.float32) if descriptors is None else descriptors[order]
        root = np.sqrt(histograms / histograms.sum(1, keepdims=True))
        return Keypoints(
            torch.stack([x, y], dim=1),
            torch.ones(len(order), dtype=torch.bool),
            grey.shape,
            scores=scores,
            scales=scales,
            angles=angles,
            descriptors=torch.from_numpy(root),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    path = parser.parse_args().image
    image = cv2.imread(path)
    if image is None:
        raise SystemExit(f"cannot read {path}")
    images = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).movedim(-1, 0)[None]
    keypoints = OpenCVSIFT()(images)
    assert keypoints.scales is not None
    for position, scale in zip(keypoints.positions[0, :10].tolist(), keypoints.scales[0, :10].tolist(), strict=True):
        print("x {:.2f}, y {:.2f}, scale {:.2f}".format(*position, scale))
    print(f"{int(keypoints.valid.sum())} keypoints; the strongest ten above")


if __name__ == "__main__":
    main()
