"""KeypointDetector: what may stand at the beginning of the data flow."""

from __future__ import annotations

from typing import Annotated, Protocol, runtime_checkable

from torch import Tensor

from kaf_layer.keypoints import Keypoints

__all__ = ["KeypointDetector"]


@runtime_checkable
class KeypointDetector(Protocol):
    """Anything that turns a batch of images into :class:`~kaf_layer.Keypoints`.

    A function or a module, learned or not. The rest of the package asks only that

    - ``positions`` are in pixels of the images given, ``(x, y)`` or ``(x, y, z)``, pixel centres at integers,
    - ``image_size`` is the spatial size of the images given,
    - slots that hold no keypoint are not ``valid``.

    Scores, scales, angles and descriptors are optional. ``examples/opencv_sift.py`` wraps
    a detector that knows neither batches nor tensors.

    Example:
        >>> from kaf_layer.detection import GridDetector, KeypointDetector
        >>> detector: KeypointDetector = GridDetector(spacing=8)
        >>> detector(torch.zeros(2, 1, 32, 24)).positions.shape
        torch.Size([2, 12, 2])
    """

    def __call__(self, images: Annotated[Tensor, "B C *S"], /) -> Keypoints:
        """Detects keypoints in every image."""
        ...
