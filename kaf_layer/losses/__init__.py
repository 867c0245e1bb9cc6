"""The losses of self-supervised pretraining."""

from kaf_layer.losses.keypoint_match import KeypointMatchLoss, keypoint_match_loss
from kaf_layer.losses.pcl import PCLLoss, pcl_loss
from kaf_layer.losses.pretraining import KAFPretrainingLoss, PretrainingLosses

__all__ = [
    "KAFPretrainingLoss",
    "KeypointMatchLoss",
    "PCLLoss",
    "PretrainingLosses",
    "keypoint_match_loss",
    "pcl_loss",
]
