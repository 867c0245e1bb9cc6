"""Images, and the SIFT detectors that are compared on them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from skimage import data as shipped

from kaf_layer.detection import SIFTDetector

NAMES = [
    *("astronaut", "brick", "camera", "chelsea", "clock", "coffee", "coins", "grass", "gravel", "moon"),
    *("motorcycle", "page", "retina", "rocket", "text"),
]

Upscale = Literal["precise", "opencv"]


class Points(NamedTuple):
    """The keypoints of one image: positions (N, 2), responses (N,) and RootSIFT descriptors (N, 128)."""

    positions: np.ndarray
    scores: np.ndarray
    descriptors: np.ndarray


def stretched(image: np.ndarray) -> np.ndarray:
    """Converts to 8 bits, from the image's minimum to its maximum."""
    grey = image if image.ndim == 2 else cv2.cvtColor(image[..., :3], cv2.COLOR_RGB2GRAY)
    return cv2.normalize(grey.astype(np.float32), None, 0, 255, cv2.NORM_MINMAX).round().astype(np.uint8)


def natural_images() -> list[np.ndarray]:
    images = []
    for name in NAMES:
        loaded = getattr(shipped, "stereo_motorcycle" if name == "motorcycle" else name)()
        image = stretched(loaded[0] if isinstance(loaded, tuple) else loaded)
        if max(image.shape) > 640:
            scale = 640 / max(image.shape)
            image = stretched(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        images.append(image)
    return images


def mri_slices(folder: Path) -> list[np.ndarray]:
    files = sorted(folder.glob("sunnybrook/*/*_ED.nii.gz"))
    if not files:
        return []
    import nibabel

    volumes = (np.asarray(nibabel.Nifti1Image.from_filename(file).dataobj) for file in files)
    return [stretched(volume[..., volume.shape[2] // 2].T) for volume in volumes]


def opencv(limit: int, upscale: Upscale = "precise") -> cv2.SIFT:
    # The arguments are given by position, because their names changed between OpenCV 4 and 5.
    return cv2.SIFT_create(limit, 3, 0.04, 10, 1.6, upscale == "precise")


def detect_opencv(image: np.ndarray, limit: int, upscale: Upscale = "precise") -> Points:
    found, descriptors = opencv(limit, upscale).detectAndCompute(image, None)
    table = np.array([(*point.pt, point.response) for point in found]).reshape(-1, 3)
    descriptors = np.zeros((0, 128)) if descriptors is None else descriptors
    root = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-12))
    return Points(table[:, :2], table[:, 2], root)


def detect_ours(
    image: np.ndarray, limit: int, upscale: Upscale = "precise", orientations: Literal["strongest", "all"] = "strongest"
) -> Points:
    detector = SIFTDetector(limit, upscale=upscale, normalize=False, orientations=orientations)
    keypoints = detector(torch.from_numpy(image)[None, None])[0]
    values = (keypoints.positions, keypoints.scores, keypoints.descriptors)
    return Points(*(value[keypoints.valid].double().numpy() for value in values if value is not None))


def best_positions(points: Points, limit: int) -> np.ndarray:
    """Returns the strongest distinct positions. OpenCV repeats a position for each of its orientations."""
    order = np.argsort(-points.scores, kind="stable")
    _, first = np.unique(points.positions[order], axis=0, return_index=True)
    return points.positions[order][np.sort(first)][:limit]


def first_orientations(image: np.ndarray, limit: int) -> Points:
    """Returns OpenCV's keypoints, with each position once."""
    points = detect_opencv(image, limit)
    _, first = np.unique(points.positions, axis=0, return_index=True)
    return Points(*(value[np.sort(first)] for value in points))
