"""The losses of self-supervised pretraining."""

from kaf_layer.losses.pcl import PCLLoss, pcl_loss

__all__ = ["PCLLoss", "pcl_loss"]
