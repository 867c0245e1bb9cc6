"""Which keypoint of one image is which of another: from descriptors, and learned."""

from kaf_layer.matching.sinkhorn import log_sinkhorn

__all__ = ["log_sinkhorn"]
