"""Diffusion: tokens to a dense feature map, at a cost set by the keypoints (Section 3.1 of the paper)."""

from kaf_layer.diffusion.network import KeypointDiffusion, cheapest_method

__all__ = ["KeypointDiffusion", "cheapest_method"]
