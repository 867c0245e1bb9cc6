"""The detectors of keypoints that ``--detector`` names."""

from collections.abc import Callable

import kornia.feature as KF
from torch import Tensor, nn

from examples.kornia_detector import KorniaDetector
from examples.protocol.files import load
from examples.protocol.options import Options
from examples.superpoint import SuperPoint
from kaf_layer import GridDetector, KeypointDetector, Keypoints, SIFTDetector

# Each takes the largest number of keypoints. Its weights come from --detector-weights.
FEATURES: dict[str, Callable[[int], nn.Module]] = {
    "disk": lambda _: KF.DISK(),
    "dedode": lambda _: KF.DeDoDe(descriptor_model="B"),
    "aliked": lambda count: KF.ALIKED(max_num_keypoints=count),
    "keynet": lambda count: KF.LocalFeature(
        KF.KeyNetDetector(pretrained=False, num_features=count), KF.LAFDescriptor(KF.HardNet(pretrained=False), 32)
    ),
    "superpoint": SuperPoint,
}


def build_detector(options: Options) -> KeypointDetector:
    if options.detector in FEATURES:
        feature = FEATURES[options.detector](options.max_keypoints)
        assert options.detector_weights is not None  # options without them are refused
        weights = load(options.detector_weights)
        try:
            feature.load_state_dict(weights.get("extractor", weights))  # DISK's file also holds other things
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"{options.detector_weights} holds no weights of --detector {options.detector}") from error
        return feature if isinstance(feature, SuperPoint) else KorniaDetector(feature, options.max_keypoints)
    if options.detector == "sift" and options.spatial_dims == 3:
        return SIFTDetector(options.max_keypoints, spatial_dims=3, descriptors=False)
    if options.detector == "sift":
        return SIFTDetector(options.max_keypoints)
    return GridDetector(options.spacing) if options.detector == "grid" else no_keypoints


def redetector(options: Options) -> KeypointDetector | None:
    """The detector for augmented images if keypoints are not moved: those of a grid, and all keypoints of volumes."""
    if options.detector == "grid" and options.spatial_dims == 2:
        return GridDetector(options.spacing * options.resize)
    return build_detector(options) if options.spatial_dims == 3 else None


def no_keypoints(images: Tensor) -> Keypoints:
    """One empty slot for each image."""
    positions = images.new_zeros(len(images), 1, images.ndim - 2)
    return Keypoints(positions, positions[..., 0] > 0, tuple(images.shape[2:]))
