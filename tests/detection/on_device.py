"""SIFT where ``pytest --device`` says; images come from the CPU, and keypoints go back there."""

from common import TARGET
from torch import Tensor

import kaf_layer
from kaf_layer import Keypoints


class SIFTDetector(kaf_layer.SIFTDetector):
    """The package's, on the device of the tests."""

    def forward(self, images: Tensor) -> Keypoints:
        return super().forward(images.to(TARGET.device)).to("cpu")
