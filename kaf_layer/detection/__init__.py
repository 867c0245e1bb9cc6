"""Where keypoints come from: SIFT, a uniform grid, or anything that keeps to the protocol."""

from kaf_layer.detection.grid import GridDetector
from kaf_layer.detection.protocol import KeypointDetector
from kaf_layer.detection.sift import SIFTDetector

__all__ = ["GridDetector", "KeypointDetector", "SIFTDetector"]
