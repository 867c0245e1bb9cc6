"""The protocol on volumes in one piece: patches, augmentation, fine-tuning and bad input."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.protocol.experiments.finetuning", reason="the extra train is not here")
from examples.protocol import cross_validate, finetune  # after the skip
from examples.protocol.models.detectors import redetector
from examples.protocol.models.networks import build_model
from examples.protocol.options import FinetuneOptions, PretrainOptions, parse
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.volumes.stacks import Stack, prepare
from examples.protocol.volumes.volume import Volume
from kaf_layer import GridDetector

OPTIONS = ["--spatial-dims", "3", "--patch", "16", "24", "20", "--width", "4", "--classes", "2", "--levels", "3"]
OPTIONS += ["--depth", "1", "--embed-dim", "8", "--detector", "grid", "--spacing", "8", "--folds", "2"]
LEARNING = ["--loss", "dice_ce", "--batch", "2", "--epochs", "4", "--steps-per-epoch", "20", "--lr", "0.01"]


@pytest.fixture(scope="module")
def stacks() -> list[Stack]:
    """Four subjects, each with a bright ball somewhere."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(torch.arange(14), torch.arange(26), torch.arange(18), indexing="ij")
    volumes = []
    for subject in "abcd":
        centre = torch.tensor([6.0, 12.0, 8.0]) + 3 * torch.rand(3, generator=generator)
        label = (sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < 16).long()
        volumes.append(Volume(2 * label + 0.5 * torch.randn(label.shape, generator=generator), label, subject))
    return prepare(volumes, GridDetector(8), patch=(16, 24, 20))


def test_a_volume_is_one_patch_about_its_centre(stacks: list[Stack]) -> None:
    volume = stacks[0].volume
    assert stacks[0].images.shape == (1, 1, 16, 24, 20)
    assert stacks[0].images[0, 0, 1:15, :, 1:19].equal(volume.image[:, 1:25])  # rows are cut, the rest is padded
    assert stacks[0].labels[0, 1:15, :, 1:19].equal(volume.label[:, 1:25])
    assert stacks[0].keypoints[0].positions.shape == (2 * 3 * 2, 3)
    assert stacks[0].restore(stacks[0].labels).equal(volume.label)
    assert stacks[0].crop(volume.label).equal(stacks[0].labels)
    (half,) = prepare([volume], GridDetector(4), patch=(8, 12, 8), resize=0.5)
    assert half.resized == (7, 13, 9)
    assert half.restore(half.labels).shape == volume.label.shape


def test_volumes_and_labels_move_alike() -> None:
    """A ball stays where its label is, mirroring leaves no frame, and a grid is found anew."""
    torch.manual_seed(0)
    axes = torch.meshgrid(torch.arange(20.0), torch.arange(32.0), torch.arange(24.0), indexing="ij")
    label = (sum((axis - c) ** 2 for axis, c in zip(axes, (8.0, 18.0, 10.0), strict=True)) < 25).long()
    images, labels = (5.0 + 3 * label).expand(40, 1, -1, -1, -1), label.expand(40, -1, -1, -1)
    grid = GridDetector(8)
    augment = Augmentation(detector=grid, spatial_dims=3)
    moved, _, moved_labels = augment.move(images, grid(images), labels)
    assert moved.min() >= 5 - 1e-4
    assert ((moved[:, 0] > 6.5) == (moved_labels > 0)).float().mean() > 0.995  # but for pixels on the edge
    volumes = moved_labels.sum((1, 2, 3)) / label.sum()
    assert volumes.min() < 0.75  # scaled from 0.8 to 1.25, so from 0.51 to 1.95
    assert volumes.max() > 1.35
    _, keypoints, _ = augment(images, grid(images[..., :8]), labels)
    assert keypoints.positions.equal(grid(images).positions)


@pytest.mark.parametrize("model", ["unet-c2", "kaf-unet"])
def test_networks_learn_from_volumes(model: str, stacks: list[Stack], tmp_path: Path) -> None:
    flags = [*OPTIONS, *LEARNING, "--model", model, "--labelled", "2"]
    result = finetune.main([*flags, "--output", str(tmp_path)], stacks=stacks)
    assert len(result["scores"]) == 2
    assert result["dice"] > 0.6
    untrained = [*flags, "--epochs", "1", "--lr", "0", "--output", str(tmp_path / "untrained")]
    assert finetune.main(untrained, stacks=stacks)["dice"] < 0.4


@pytest.mark.parametrize(("detector", "slots"), [("sift", 16), ("none", 1)])
def test_detectors(detector: str, slots: int, stacks: list[Stack]) -> None:
    chosen = ["--detector", detector, "--max-keypoints", "16"]
    find = redetector(parse(FinetuneOptions, [*OPTIONS, *chosen, "--output", "x"]))
    assert find(stacks[0].images).positions.shape == (1, slots, 3)


def test_swin_unetr_for_volumes(stacks: list[Stack]) -> None:
    flags = [*OPTIONS, "--model", "swin-unetr", "--patch", "64", "32", "32", "--window", "3", "--output", "x"]
    model = build_model(parse(FinetuneOptions, flags)).eval()
    assert model(torch.rand(1, 1, 64, 32, 32), stacks[0].keypoints[0]).shape == (1, 2, 64, 32, 32)
    sizes = {len(table) for name, table in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert sizes == {(2 * 3 - 1) ** 3}


def test_a_table_of_phantoms(tmp_path: Path) -> None:
    phantoms = ["--limit", "2", "--resize", "0.25", "--patch", "8", "32", "28", "--classes", "4"]
    flags = [*OPTIONS, *phantoms, "--finetune", "--epochs 1 --batch 1 --lr 0.01 --loss ce"]
    cross_validate.main(
        [*flags, "--methods", "unet", "--labelled", "1", "--test-folds", "0", "--output", str(tmp_path)]
    )
    assert "spatial_dims 3" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch", "16", "24"], r"--patch must have --spatial-dims 3 edges, got \[16, 24\]"),
        (["--model", "swin-unetr", "--window", "0"], "--window must be 1 or more, got 0"),
        (
            ["--model", "fcn"],
            "--spatial-dims 3 supports --model unet, unet-c2, kaf-unet, swin-unetr .* got fcn and grid",
        ),
        (["--detector", "disk", "--detector-weights", "x.pt"], "--detector sift, grid or none, got kaf-unet and disk"),
        (["--token-loss", "1"], "--token-loss needs --model kaf-unet and --spatial-dims 2, got kaf-unet and 3"),
        (["--patch", "16", "24", "18"], r"--levels 3 needs a --patch divisible by 4, got \[16, 24, 18\]"),
    ],
)
def test_options_that_do_not_fit_together(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(FinetuneOptions, [*OPTIONS, *flags, "--output", "x"])


def test_pretraining_is_of_slices() -> None:
    with pytest.raises(ValueError, match="pretraining learns from slices, got --spatial-dims 3"):
        parse(PretrainOptions, ["--preset", "hippocampus", "--output", "x"])
