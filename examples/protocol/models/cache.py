"""Detected keypoints kept on the disk, and found again by the content of the images."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from torch import Tensor

import kaf_layer.detection
from examples.protocol.files import load, save
from examples.protocol.options import Options
from kaf_layer import KeypointDetector, Keypoints

CHEAP = ("grid", "none")  # detectors that need no cache


def cached(detector: KeypointDetector, options: Options) -> KeypointDetector:
    """The detector of these options, which looks into ``--cache`` first, if there is one."""
    if options.cache is None or options.detector in CHEAP:
        return detector
    return CachedDetector(detector, options.cache, names(options))


class CachedDetector:
    """A detector that detects the keypoints of the same images once.

    Args:
        detector: from images to keypoints.
        folder: where a file is kept for each batch of images.
        names: what the keypoints depend on besides the images.
    """

    def __init__(self, detector: KeypointDetector, folder: Path, names: Iterable[bytes]) -> None:
        self.detector, self.folder = detector, folder
        self.hash = hashlib.sha256()
        for name in names:
            self.hash.update(name + b"\0")

    def __call__(self, images: Tensor) -> Keypoints:
        """The keypoints of images (B, C, *S)."""
        hashed = self.hash.copy()
        hashed.update(f"{tuple(images.shape)} {images.dtype}".encode())
        hashed.update(images.detach().cpu().numpy().tobytes())
        path = self.folder / f"{hashed.hexdigest()}.pt"
        with suppress(FileNotFoundError, ValueError):  # what cannot be read is detected again
            return Keypoints(**load(path)).to(images.device)
        keypoints = self.detector(images)
        on_cpu = keypoints.to("cpu")
        save({f.name: getattr(on_cpu, f.name) for f in fields(on_cpu)}, path)
        return keypoints


def names(options: Options) -> list[bytes]:
    """The detector, its options, its weights and its code."""
    weights = options.detector_weights
    code = sorted(Path(kaf_layer.detection.__file__).parent.rglob("*.py")) if options.detector == "sift" else []
    chosen = f"{options.detector} {options.max_keypoints} {options.spatial_dims} {kaf_layer.__version__}"
    return [chosen.encode(), *(path.read_bytes() for path in [*code, *([weights] if weights else [])])]
