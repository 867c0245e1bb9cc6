"""The examples: the paper's networks, and the demo from data to pictures."""

import re
from pathlib import Path

import pytest
import torch
from common import random_keypoints
from torch import nn

from examples.fcn import FCN, KAFFCN
from examples.protocol import demo
from examples.unet import KAFUNet, Repeat, UNet, UNetC2

SMALL = {"embed_dim": 16, "depth": 1}
DEMO_NEEDS = "the demo needs the extras train and plot"
KEYPOINTS = random_keypoints((32, 48), (9, 0), dtype=torch.float32)
NETWORKS = {
    "unet": lambda: UNet(1, 3, width=4),
    "unet-c2": lambda: UNetC2(1, 3, width=4),
    "kaf-unet": lambda: KAFUNet(1, 3, width=4, **SMALL),
    "one-layer": lambda: UNet(1, 3, width=4, layers=[None, Repeat(8), None, None]),
    "fcn": lambda: FCN(1, 3, width=4),
    "kaf-fcn": lambda: KAFFCN(1, 3, width=4, **SMALL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_in_every_parameter(name: str) -> None:
    network = NETWORKS[name]()
    logits = network(torch.rand(2, 1, 32, 48), KEYPOINTS)
    assert logits.shape == (2, 3, 32, 48)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_swin_unet() -> None:
    """The size is the paper's, all parameters learn, and maps grow as by a pixel shuffle."""
    script = pytest.importorskip("examples.swin_unet", reason="the extra train is not here")
    with torch.device("meta"):
        full = script.SwinUNet(3, 9)
        assert [f.shape[1:] for f in full.encoder(torch.zeros(1, 3, 224, 192)).features] == [
            (96, 56, 48),
            (192, 28, 24),
            (384, 14, 12),
            (768, 7, 6),
        ]
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(27.2e6, rel=0.01)  # Cao et al.: 27.17 M
    network = script.SwinUNet(1, 3, embed_dim=12)
    logits = network(torch.rand(2, 1, 32, 64))
    assert logits.shape == (2, 3, 32, 64)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    expand = script.Expand(4, 2)
    image = torch.randn(1, 4, 3, 5)
    oracle = torch.nn.functional.pixel_shuffle(
        expand.linear(image.movedim(1, -1)).unflatten(-1, (4, 2)).movedim((-1, -2), (1, 2)).flatten(1, 2), 2
    )
    torch.testing.assert_close(expand(image), expand.norm(oracle.movedim(1, -1)).movedim(-1, 1))
    with pytest.raises(ValueError, match=r"divisible by 32, got images.shape=torch.Size\(\[1, 1, 32, 40\]\)"):
        network(torch.rand(1, 1, 32, 40))


@pytest.mark.parametrize(("build", "plain"), [(KAFUNet, UNet), (KAFFCN, FCN)])
def test_keypoints_reach_the_logits(build: type[nn.Module], plain: type[nn.Module]) -> None:
    images = torch.rand(2, 1, 32, 48)
    network = build(width=4, **SMALL).eval()
    assert not torch.allclose(network(images, KEYPOINTS)[0], network(images, KEYPOINTS.resize((32, 48))[[1, 0]])[0])
    with pytest.raises(ValueError, match="keypoints=None"):
        network(images)
    assert plain(width=4)(images).shape == (2, 4, 32, 48)


def test_unet_refuses_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"divisible by 16, got images.shape=torch.Size\(\[1, 1, 32, 40\]\)"):
        UNet()(torch.rand(1, 1, 32, 40))


def test_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = pytest.importorskip("examples.pretrain", reason="the extra train is not here")
    script.main(20, tmp_path / "encoder.pt", batch=2)
    (loss,) = re.findall(r"step 20: loss ([\d.]+)", capsys.readouterr().out)
    assert 0 < float(loss) < 10
    weights = torch.load(tmp_path / "encoder.pt")
    assert all(value.isfinite().all() for value in weights.values())
    assert any("layers.0" in name for name in weights)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("examples.protocol.experiments.demonstration", reason=DEMO_NEEDS)
    picture = tmp_path / "new" / "demo.png"
    small = ["--subjects", "3", "--steps", "1", "--batch", "2", "--width", "4", "--seeds", "0", "1"]
    demo.main([*small, "--output", str(picture)])
    table = capsys.readouterr().out
    assert "1 steps on 1 subjects, tested on 2 others, seeds 0, 1;" in table
    assert picture.stat().st_size > 10_000
    for model in ("UNet", "KAF-UNet"):
        (row,) = re.findall(rf"^\| {model} \|.*$", table, flags=re.MULTILINE)
        *scores, mean = (float(cell.split("±")[0]) for cell in row.split("|")[4:-1])
        assert mean == pytest.approx(sum(scores) / 2, abs=2e-3)
        assert all(0 <= score <= 1 for score in scores)


def test_demo_needs_two_subjects() -> None:
    pytest.importorskip("examples.protocol.experiments.demonstration", reason=DEMO_NEEDS)
    with pytest.raises(ValueError, match="one subject to train on and one to test on"):
        demo.main(["--subjects", "1"])


@pytest.mark.parametrize("labels", [(0, 1, 3), (0, 255), (2, 5)])
def test_demo_counts_the_classes_that_there_are(labels: tuple[int, ...]) -> None:
    """Perfect predictions score 1, whatever numbers nobody has, and though a subject lacks a class."""
    demonstration = pytest.importorskip("examples.protocol.experiments.demonstration", reason=DEMO_NEEDS)
    maps = [torch.tensor(labels)[torch.arange(24).view(2, 3, 4) % count] for count in (len(labels), 2)]
    volumes = [demonstration.Volume(torch.zeros(2, 3, 4), label, f"s{i}") for i, label in enumerate(maps)]
    renumbered, values = demonstration.renumber(volumes)
    assert values == sorted({0, *labels})
    for before, after in zip(volumes, renumbered, strict=True):
        assert torch.tensor(values)[after.label].equal(before.label)
    slices = [demonstration.Slices(v.image[:, None], v.label[:, None], None, v.subject) for v in renumbered]
    perfect = demonstration.dice([s.labels for s in slices], slices, len(values))
    assert perfect.tolist() == [1.0] * (len(values) - 1)
    worse = [torch.zeros_like(slices[0].labels), *(s.labels for s in slices[1:])]
    assert demonstration.dice(worse, slices, len(values))[0] == 0.5  # one subject of two


def test_demo_of_files_with_many_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("examples.protocol.experiments.demonstration", reason=DEMO_NEEDS)
    from test_data import write

    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        label = (torch.arange(40 * 32 * 2).view(40, 32, 2) // 2 % 32 // 2).clamp(max=12)
        image = label + torch.randn(label.shape, generator=generator)
        write(tmp_path / "images" / f"{name}.nii.gz", image.numpy())
        write(tmp_path / "labels" / f"{name}.nii.gz", label.numpy().astype("uint8"))
    small = ["--data", str(tmp_path), "--steps", "1", "--batch", "2", "--width", "4", "--seeds", "0"]
    demo.main([*small, "--output", str(tmp_path / "demo.png")])
    assert "| Dice 11 | Dice 12 | mean |" in capsys.readouterr().out
    for name in "ab":
        write(tmp_path / "labels" / f"{name}.nii.gz", torch.zeros(40, 32, 2).numpy())
    with pytest.raises(ValueError, match="has only background labels"):
        demo.main([*small, "--output", str(tmp_path / "demo.png")])
