"""A cache of detected keypoints on the disk, by the content of the images."""

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
    """Adds the cache of ``--cache`` to a detector, if that option is given."""
    if options.cache is None or options.detector in CHEAP:
        return detector
    return CachedDetector(detector, options.cache, names(options))


class CachedDetector:
    """A detector that detects the keypoints of the same images only once.

    Args:
        detector: the detector to call for images that are not in the cache.
        folder: the folder with a file for each batch of images.
        names: all that the keypoints depend on apart from the images.
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
        with suppress(FileNotFoundError, ValueError):  # a file that cannot be read is replaced
            return Keypoints(**load(path)).to(images.device)
        keypoints = self.detector(images)
        on_cpu = keypoints.to("cpu")
        save({f.name: getattr(on_cpu, f.name) for f in fields(on_cpu)}, path)
        return keypoints


def names(options: Options) -> list[bytes]:
    """The name, options, weights and code of a detector."""
    weights = options.detector_weights
    code = sorted(Path(kaf_layer.detection.__file__).parent.rglob("*.py")) if options.detector == "sift" else []
    chosen = f"{options.detector} {options.max_keypoints} {options.spatial_dims} {kaf_layer.__version__}"
    return [chosen.encode(), *(path.read_bytes() for path in [*code, *([weights] if weights else [])])]
