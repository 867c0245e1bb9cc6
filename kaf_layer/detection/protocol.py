"""KeypointDetector: the protocol of everything that finds keypoints."""

from __future__ import annotations

from typing import Annotated, Protocol, runtime_checkable

from torch import Tensor

from kaf_layer.keypoints import Keypoints

__all__ = ["KeypointDetector"]


@runtime_checkable
class KeypointDetector(Protocol):
    """Anything that turns a batch of images into [Keypoints][kaf_layer.Keypoints].

    It is a function or a module, learned or not. The rest of the package requires only that

    - ``positions`` are in pixels of the given images, ``(x, y)`` or ``(x, y, z)``, with pixel centres at integers,
    - ``image_size`` is the spatial size of the given images,
    - slots that hold no keypoint are not ``valid``.

    Scores, scales, angles and descriptors are optional. ``examples/opencv_sift.py`` wraps
    a detector that takes one NumPy array at a time.

    Example:
        >>> from kaf_layer.detection import GridDetector, KeypointDetector
        >>> detector: KeypointDetector = GridDetector(spacing=8)
        >>> detector(torch.zeros(2, 1, 32, 24)).positions.shape
        torch.Size([2, 12, 2])
    """

    def __call__(self, images: Annotated[Tensor, "B C *S"], /) -> Keypoints:
        """Detects keypoints in every image.

        Args:
            images: (B, C, *S).
        """
        ...
