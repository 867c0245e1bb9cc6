"""The benchmarks of keypoints in images, at their smallest."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import harness


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def run(module, monkeypatch, *arguments):
    """Runs a script's main, which may change global settings of torch."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments])
    grad = torch.is_grad_enabled()
    try:
        module.main()
    finally:
        torch.set_grad_enabled(grad)


def rows_of(results: Path, name: str) -> list[dict]:
    return json.loads((results / f"{name}.json").read_text())["rows"]


def test_sinkhorn(results, monkeypatch):
    from benchmarks.detection import matching

    run(matching, monkeypatch, "--only", "sinkhorn", "--points", "8", "--repeats", "1")
    unrolled, ours = rows_of(results, "matching-sinkhorn-cpu")
    assert ours["times faster"] == pytest.approx(
        unrolled["forward and backward, ms"] / ours["forward and backward, ms"], rel=1e-9
    )
    assert ours["times less"] == pytest.approx(unrolled["saved, MB"] / ours["saved, MB"], rel=1e-9)


def test_detection(results, monkeypatch):
    pytest.importorskip("cv2", reason="the detector is compared with OpenCV's")
    skimage = pytest.importorskip("skimage")
    from benchmarks.detection import images as detection

    monkeypatch.setattr(
        detection, "natural_images", lambda: [np.ascontiguousarray(skimage.data.camera()[:128, 192:320])]
    )
    run(detection, monkeypatch, "--only", "agreement", "--data", "nowhere")
    assert len(rows_of(results, "detection-agreement-cpu")) == 2


def test_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cv2", "skimage"):
        pytest.importorskip(package)
    kornia_parts = pytest.importorskip(
        "benchmarks.detection.kornia_parts", reason="an older Kornia lacks some of the parts"
    )
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(kornia_parts, "EDGE", 96)
    monkeypatch.setattr(kornia_parts, "COUNT", 40)
    monkeypatch.setattr(kornia_parts.torch, "set_num_threads", lambda _: None)
    kornia_parts.main(["--repeats", "1"])
    assert kornia_parts.torch.is_grad_enabled()
    (path,) = tmp_path.glob("kornia-parts-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["part"] for row in rows] == ["blur", "scale space", "quadratic", "orientation", "descriptor"]
    assert all(row["times ours"] > 0 for row in rows)
