"""The detectors of keypoints that ``--detector`` names."""

import argparse
from collections.abc import Callable

import kornia.feature as KF
from torch import Tensor, nn

from examples.kornia_detector import KorniaDetector
from examples.protocol.files import load
from kaf_layer import GridDetector, KeypointDetector, Keypoints, SIFTDetector

DETECTORS = ("sift", "grid", "none", "disk", "dedode", "aliked", "keynet")
LEARNT: dict[str, Callable[[], nn.Module]] = {  # without weights: these come from --detector-weights
    "disk": KF.DISK,
    "dedode": lambda: KF.DeDoDe(descriptor_model="B"),
    "aliked": KF.ALIKED,
    "keynet": lambda: KF.LocalFeature(KF.KeyNetDetector(pretrained=False), KF.LAFDescriptor(KF.HardNet(), 32)),
}


def build_detector(options: argparse.Namespace) -> KeypointDetector:
    if options.detector in LEARNT:
        feature = LEARNT[options.detector]()
        weights = load(options.detector_weights)
        feature.load_state_dict(weights.get("extractor", weights))  # DISK's file holds other things beside it
        return KorniaDetector(feature, options.max_keypoints)
    if options.detector == "sift":
        return SIFTDetector(options.max_keypoints)
    return GridDetector(options.spacing) if options.detector == "grid" else no_keypoints


def no_keypoints(images: Tensor) -> Keypoints:
    """One empty slot for each image."""
    positions = images.new_zeros(len(images), 1, 2)
    return Keypoints(positions, positions[..., 0] > 0, tuple(images.shape[2:]))
