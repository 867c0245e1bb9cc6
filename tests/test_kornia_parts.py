"""benchmarks/detection/kornia_parts.py on a small image: every part of Kornia's has its row."""

import json
from pathlib import Path

import pytest

from benchmarks.common import harness


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
