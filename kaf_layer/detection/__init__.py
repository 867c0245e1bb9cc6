"""Where keypoints come from: SIFT, a uniform grid, or anything that keeps to the protocol.

SIFT is written here, not taken from Kornia: its parts are slower and less close to OpenCV's, as
``benchmarks/detection/kornia_parts.py`` shows. Keypoints of its detectors come in by
``kaf_layer.interop.keypoints_from_lafs``.
"""

from kaf_layer.detection.grid import GridDetector
from kaf_layer.detection.protocol import KeypointDetector
from kaf_layer.detection.sift import SIFTDetector

__all__ = ["GridDetector", "KeypointDetector", "SIFTDetector"]
