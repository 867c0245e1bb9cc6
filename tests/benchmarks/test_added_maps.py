"""What benchmarks/context/added_maps.py says of added layers, on networks of which the answers are known."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.protocol.experiments.finetuning", reason="the extra train is not here")
from benchmarks.common import harness
from benchmarks.context import added_maps
from examples.protocol import finetune
from examples.protocol.files import load, save

SMALL = ["--limit", "2", "--resize", "0.25", "--patch", "32", "32", "--levels", "3", "--width", "4", "--depth", "1"]
SMALL += [
    "--embed-dim",
    "8",
    "--detector",
    "grid",
    "--spacing",
    "16",
    "--folds",
    "2",
    "--labelled",
    "1",
    "--epochs",
    "1",
]
SMALL += ["--steps-per-epoch", "1", "--model", "kaf-unet"]


def test_maps_of_known_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain of zero adds nothing. A map of biases alone is the same everywhere, and no token is needed for it."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    run = tmp_path / "run"
    finetune.main([*SMALL, "--fusion", "add", "--lr", "0", "--output", str(run)])
    added_maps.main([str(run)])
    layers = json.loads((tmp_path / "added-maps-cpu.json").read_text())["rows"]
    assert len(layers) == 2
    for row in layers:
        assert row["gain"] == row["added / features"] == 0
        losses = [value for name, value in row.items() if name.startswith("loss")]
        assert losses == pytest.approx([losses[0]] * 4)

    checkpoint = load(run / "checkpoint.pt")
    name = next(name for name in checkpoint["module"] if name.endswith("gain"))
    layer = name.removesuffix("gain")
    checkpoint["module"][name] += 3.0
    checkpoint["module"][f"{layer}diffusion.conv2.weight"] *= 0
    checkpoint["module"][f"{layer}diffusion.conv2.bias"] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    save(checkpoint, run / "checkpoint.pt")
    added_maps.main([str(run)])
    first, second = json.loads((tmp_path / "added-maps-cpu.json").read_text())["rows"]
    assert first["gain"] == pytest.approx(3)
    assert first["the same in all images"] == pytest.approx(1)
    assert first["in the strongest channel"] > first["added / features"] > 0
    assert first["loss if it is the same in all"] == pytest.approx(first["loss"])
    assert first["loss if tokens know places only"] == pytest.approx(first["loss"])
    assert abs(first["loss without it"] - first["loss"]) > 1e-4
    assert second["added / features"] == 0


def test_a_run_without_added_layers(tmp_path: Path) -> None:
    finetune.main([*SMALL, "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="must be a run with --fusion add, got --model kaf-unet"):
        added_maps.main([str(tmp_path)])
