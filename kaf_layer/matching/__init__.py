"""Which keypoint of one image is which of another: from descriptors, and learned."""

from kaf_layer.matching.correspondence import Matches, match_keypoints
from kaf_layer.matching.matcher import KeypointMatcher
from kaf_layer.matching.sinkhorn import log_sinkhorn

__all__ = ["KeypointMatcher", "Matches", "log_sinkhorn", "match_keypoints"]
