"""Detected keypoints on the disk: found again by the content of the images, and only then."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("examples.protocol.experiments.inputs", reason="the extra train is not here")
from examples.protocol.experiments.inputs import prepare_volumes
from examples.protocol.models import cache, detectors
from examples.protocol.options import Options, changed, parse
from examples.protocol.volumes.volume import Volume
from kaf_layer import Keypoints, SIFTDetector

SMALL = ["--patch", "32", "32", "--levels", "3", "--max-keypoints", "20", "--output", "x"]


class Counted:
    """A detector that counts its calls."""

    def __init__(self) -> None:
        self.detector, self.calls = SIFTDetector(20), 0

    def __call__(self, images: Tensor) -> Keypoints:
        self.calls += 1
        return self.detector(images)


def same(a: Keypoints, b: Keypoints) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(x.equal(y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def test_the_same_images_are_detected_once(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 40, 28, generator=torch.Generator().manual_seed(0))
    counted = Counted()
    detector = cache.CachedDetector(counted, tmp_path / "new", [b"sift"])
    first = detector(images)
    assert same(first, counted.detector(images))
    assert same(detector(images.clone()), first)
    assert counted.calls == 1
    detector(images.mT)  # the same numbers in another shape
    detector(images + 1e-6)
    assert counted.calls == 3
    cache.CachedDetector(counted, tmp_path / "new", [b"other"])(images)
    assert counted.calls == 4
    for path in (tmp_path / "new").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert same(detector(images), first)  # a file that was cut short is written anew
    assert same(detector(images), first)
    assert counted.calls == 5


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ([], False),
        (["--width", "4", "--resize", "0.5", "--patch", "16", "16"], False),  # they decide nothing for the detector
        (["--max-keypoints", "10"], True),
    ],
)
def test_what_the_keypoints_depend_on(
    flags: list[str], again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.rand(2, 40, 28, generator=torch.Generator().manual_seed(0))
    volumes = [Volume(image, torch.zeros_like(image).long(), "a")]
    before = prepare_volumes(volumes, parse(Options, [*SMALL, "--cache", str(tmp_path)]))
    counted = Counted()
    monkeypatch.setattr("examples.protocol.experiments.inputs.build_detector", lambda _: counted)
    after = prepare_volumes(volumes, parse(Options, [*SMALL, "--cache", str(tmp_path), *flags]))
    assert counted.calls == again
    assert again or after[0].keypoints[0].valid.sum() == before[0].keypoints[0].valid.sum()


def test_what_needs_no_cache() -> None:
    options = parse(Options, [*SMALL, "--detector", "grid", "--cache", "folder"])
    detector = detectors.build_detector(options)
    assert cache.cached(detector, options) is detector
    assert cache.cached(detector, changed(options, {"detector": "sift", "cache": None})) is detector
