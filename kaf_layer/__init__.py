"""Keypoint-augmented fusion: long-range attention for any PyTorch backbone, for the price of its keypoints."""

from kaf_layer.keypoints import Keypoints

__all__ = ["Keypoints"]
__version__ = "0.1.0"
