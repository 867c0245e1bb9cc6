"""SIFT of images and volumes: scale space, extrema, refinement, orientation, description."""

from kaf_layer.detection.sift.detector import SIFTDetector

__all__ = ["SIFTDetector"]
