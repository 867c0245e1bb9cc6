"""The benchmark of context: its task tells nothing near the target, and its parts run, go on and are drawn."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from torch import nn

from benchmarks.common import harness
from benchmarks.context import addition, attached, by_field, synthetic
from benchmarks.context.networks import GlobalAttention
from benchmarks.context.task import EDGE, FARTHEST, IGNORED, NEAREST, Task, draw_task
from examples.protocol import cross_validate
from examples.protocol.volumes.splits import make_split
from examples.protocol.volumes.stacks import prepare
from examples.protocol.volumes.volume import Volume
from examples.unet import UNet
from kaf_layer import GridDetector, Keypoints


@pytest.fixture(scope="module")
def task() -> Task:
    return draw_task(60, seed=3)


def test_the_class_is_that_of_the_far_ring(task: Task) -> None:
    for image, labels, distance in zip(task.images[:, 0], task.labels, task.distances, strict=True):
        asked = labels != IGNORED
        (kind,) = labels[asked].unique().tolist()
        y, x = asked.nonzero().float().mean(0).tolist()
        away = torch.hypot(torch.arange(EDGE) - x, (torch.arange(EDGE) - y)[:, None])
        ring = (away - distance).abs() <= 9
        # Of the bright blobs and the ring, only a dark ring is much darker than the ground.
        assert (image[ring].min() < -0.9) == (kind == 0)
        assert NEAREST <= distance <= FARTHEST
    assert task.distances.max() > 70


def test_nothing_near_the_target_tells_its_class(task: Task) -> None:
    """The mean patches of both classes are one, up to the noise."""
    patches = {0: [], 1: []}
    for image, labels in zip(task.images[:, 0], task.labels, strict=True):
        asked = labels != IGNORED
        y, x = asked.nonzero().float().mean(0).round().int().tolist()
        patches[int(labels[asked][0])].append(image[y - 5 : y + 6, x - 5 : x + 6])
    means = [torch.stack(patch).mean(0) for patch in patches.values()]
    assert all(len(patch) > 15 for patch in patches.values())
    assert (means[0] - means[1]).abs().max() < 0.3
    assert means[0].min() < -1.7


def test_the_task_is_that_of_its_seed(task: Task) -> None:
    assert torch.equal(draw_task(60, seed=3).images, task.images)
    assert not torch.equal(draw_task(60, seed=4).images, task.images)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_the_receptive_field(levels: int) -> None:
    """Two convolutions at each level on the way down and up, the border's alignment to the coarsest pixels aside."""
    down = sum(2 * 2**i for i in range(levels))
    up = sum(2 * 2**i for i in range(levels - 1))
    radius = synthetic.receptive_radius(UNet(1, 2, width=4, layers=[None] * (levels - 1)))
    assert down + up <= radius <= down + up + 2**levels


def test_global_attention_reaches_every_pixel() -> None:
    layer = GlobalAttention(4, patch=4, embed_dim=8, depth=1).eval()
    features = torch.rand(2, 4, 16, 24)
    keypoints = Keypoints(torch.zeros(2, 1, 2), torch.zeros(2, 1, dtype=torch.bool), (64, 96))
    before = layer(features, keypoints)
    assert before.features.shape == (2, layer.fused_channels, 16, 24)
    assert before.tokens.shape == (2, 4 * 6, 8)
    features[0, :, 15, 23] += 1
    changed = layer(features, keypoints).features != before.features
    assert changed[0, 4:].any(0).all()
    assert not changed[1].any()


def test_synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(synthetic, "TESTED", 10)
    arguments = ["--steps", "1", "--images", "8", "--output", str(tmp_path), "--seeds", "0", "1"]
    synthetic.main([*arguments, "--networks", "UNet", "KAF-UNet, added"])
    rows = json.loads((tmp_path / "results" / "context-synthetic-cpu.json").read_text())["rows"]
    assert [row["network"] for row in rows] == ["UNet", "KAF-UNet, added"]
    assert rows[0]["GFLOPs"] < rows[1]["GFLOPs"]
    assert all(0 <= value <= 1 or math.isnan(value) for row in rows for name, value in row.items() if name[0].isdigit())
    assert (tmp_path / "results" / "context.png").stat().st_size > 10_000
    assert "UNet, seed 1" in capsys.readouterr().out
    synthetic.main([*arguments, "--networks", "UNet", "KAF-UNet, added"])
    assert "seed" not in capsys.readouterr().out.split("|")[0]  # nothing is done twice


@pytest.mark.parametrize("data", ["sunnybrook", "lumbar"])
def test_by_field(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method with each number of levels, beside the UNet with as many."""
    commands = []

    def cross_validated(arguments: list[str]) -> list[dict]:
        commands.append(arguments)
        levels = int(arguments[arguments.index("--levels") + 1])
        gains = dict.fromkeys(by_field.DATA_SETS[data].methods, 0.0) | {"kaf-unet": 0.1 / levels}
        return [
            {
                "method": name,
                "fold": fold,
                "M": 2,
                "seed": 0,
                "settings": {"patch": [96, 96], "levels": levels, "epochs": 7},
            }
            | {"dice": 0.55 + gain, "scores": [["a", 0.5 + gain], ["a", 0.6 + gain]]}
            for name, gain in gains.items()
            for fold in (0, 1)
        ]

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(cross_validate, "main", cross_validated)
    few = [data, "--levels", "3", "5", "--folds", "0", "1"]
    by_field.main([*few, "--data", "d", "--output", str(tmp_path), "--epochs", "7", "--channels-last"])
    assert len(commands) == 2
    assert all(command[-3:] == ["--epochs", "7", "--channels-last"] for command in commands)
    assert {str(tmp_path / data / "levels3"), data, "0", "1"} <= set(commands[0])
    rows = json.loads((tmp_path / f"context-{data}-cpu.json").read_text())["rows"]
    kaf = [row for row in rows if row["network"] == "KAF-UNet"]
    assert [row["Dice"] for row in kaf] == pytest.approx([0.55 + 0.1 / 3, 0.55 + 0.1 / 5])
    assert [row["receptive field / edge"] for row in kaf] == pytest.approx([32 / 96, 140 / 96])
    assert kaf[0]["ahead of UNet"] == "+0.033, p = 0.5"
    assert kaf[0]["in folds"] == kaf[0]["in runs"] == "2 of 2"
    added = next(row for row in rows if row["network"] == "KAF-UNet, added")
    assert added["in folds"] == added["in runs"] == "0 of 2"
    assert (tmp_path / "context.png").stat().st_size > 10_000
    files = [tmp_path / f"{levels}.json" for levels in (3, 5)]
    for file in files:
        file.write_text(json.dumps(cross_validated(["--levels", file.stem])))
    commands.clear()
    by_field.main([*few, "--results", *map(str, files)])
    assert not commands
    assert json.loads((tmp_path / f"context-{data}-cpu.json").read_text())["rows"] == rows
    one_fold = [r for r in json.loads(files[0].read_text()) if (r["method"], r["fold"]) != ("kaf-unet", 1)]
    files[0].write_text(json.dumps(one_fold))
    by_field.main([*few, "--results", *map(str, files)])
    (kaf, _) = [
        r for r in json.loads((tmp_path / f"context-{data}-cpu.json").read_text())["rows"] if r["network"] == "KAF-UNet"
    ]
    assert (kaf["in folds"], kaf["by fold"]) == ("1 of 1", "+0.033")


@pytest.mark.parametrize(("network", "name"), [("monai", "attached"), ("smp", "attached-smp")])
def test_layers_attached_to_a_trained_network(
    network: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    volumes = []
    for subject in "abcd":
        label = torch.zeros(3, 64, 64, dtype=torch.long)
        label[:, 20:40, 10:30] = 1
        volumes.append(Volume(label + torch.randn(3, 64, 64, generator=generator), label, subject))
    stacks = prepare(volumes, GridDetector(32), patch=(24, 32), resize=0.375)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(attached, "load_stacks", lambda _: stacks)
    monkeypatch.setattr(attached, "load_split", lambda *_: make_split("abcd", folds=2))
    small = ["--data", "d", "--steps", "2", "--folds", "0", "1", "--labelled", "1", "--output", str(tmp_path)]
    small += ["--network", network]
    attached.main(small)
    rows = json.loads((tmp_path / f"{name}-cpu.json").read_text())["rows"]
    assert [row["network"] for row in rows] == ["UNet", "fine-tuned", "fine-tuned with layers attached"]
    files = sorted(tmp_path.glob(f"sunnybrook/{network}/fold*.json"))
    before = [json.loads(file.read_text()) for file in files]
    assert all(0 < gain < 0.1 for result in before for gain in result["gains"])
    kept = [file.stat().st_mtime_ns for file in files]
    attached.main(small)
    assert [file.stat().st_mtime_ns for file in files] == kept  # nothing is done twice


@pytest.mark.parametrize("data", ["sunnybrook", "lumbar"])
def test_what_needs_data(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        by_field.main([data])
    assert f"{data} needs --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        by_field.main([data, "--results", "runs.json", "--epochs", "7"])
    assert "--results and --epochs 7 do not fit together" in capsys.readouterr().err


def test_an_added_map_grows_slowly_behind_a_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    addition.main(["--steps", "2", "--images", "8"])
    first, second = json.loads((tmp_path / "addition-cpu.json").read_text())["rows"]
    names = [f"added / features, {name}" for name in ("zero convolution", "gain")]
    assert [first[name] for name in names] == [0, 0]
    assert second[names[0]] > 10 * second[names[1]] > 0
    assert first["loss, gain"] == first["loss, zero convolution"] == pytest.approx(first["loss, UNet"], rel=1e-5)


def test_the_chance_is_a_half_for_a_blind_network(task: Task) -> None:
    class Blind(nn.Module):
        def forward(self, images: torch.Tensor, keypoints: Keypoints) -> torch.Tensor:  # noqa: ARG002
            return torch.tensor([0.0, 1.0])[None, :, None, None].expand(len(images), 2, *images.shape[2:])

    right = synthetic.judge(Blind(), task)
    kinds = task.labels.flatten(1).amax(1)
    assert torch.equal(right, kinds == 1)
