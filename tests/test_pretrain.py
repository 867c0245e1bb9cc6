"""Pretraining: pairs and their matches, what is learnt by whom, resumed runs."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.protocol.experiments.pretraining", reason="the extra train is not here")
from test_finetune import killed_after, weights

from examples.protocol import pretrain  # after the skip
from examples.protocol.experiments.inputs import load_stacks
from examples.protocol.methods.kaf import KAF
from examples.protocol.models.detectors import no_keypoints
from examples.protocol.models.networks import build_model
from examples.protocol.options import PretrainOptions, parse
from examples.protocol.training import checkpoints
from examples.protocol.volumes.stacks import Stack, prepare, stack_matches
from examples.protocol.volumes.volume import Volume
from kaf_layer import GridDetector, Matches

SMALL = ["--patch", "32", "32", "--width", "4", "--depth", "1", "--embed-dim", "8", "--folds", "2", "--batch", "3"]
SMALL += ["--epochs", "3", "--steps-per-epoch", "1", "--save-every", "1"]


def volumes(depths: tuple[int, ...] = (3, 1, 2)) -> list[Volume]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(depth, 40, 28, generator=generator) for depth in depths]
    return [Volume(image, torch.zeros_like(image).long(), f"s{i}") for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def stacks() -> list[Stack]:
    return prepare(volumes(), GridDetector(8), patch=(32, 32))


def run(folder: Path, stacks: list[Stack], *more: str) -> dict[str, torch.Tensor]:
    pretrain.main([*SMALL, "--output", str(folder), *more], stacks=stacks)
    return weights(folder)


def test_the_papers_recipe(stacks: list[Stack], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for preset, threshold in (("acdc", 0.35), ("chd", 0.1)):
        options = parse(PretrainOptions, ["--preset", preset, "--output", "x"])
        assert (options.lr, options.batch, options.epochs, options.folds) == (0.002, 32, 50, 5)
        assert (options.weights, options.temperature, options.threshold) == ((1, 1, 0.01), 0.1, threshold)
    run(tmp_path, stacks)
    optimizer = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["momentum"] == 0.9
    progress = capsys.readouterr().err
    assert all(f"{part}=" in progress for part in ("loss", "bottleneck", "keypoints", "matching"))


def test_neighbours_pair_slices_of_one_volume(stacks: list[Stack], capsys: pytest.CaptureFixture[str]) -> None:
    pairs = KAF.samples(stacks, parse(PretrainOptions, [*SMALL, "--output", "x"]))
    assert "s1: a slice without a neighbour" in capsys.readouterr().err
    assert [(stack.volume.subject, a, b) for stack, a, b, _ in pairs] == [
        ("s0", 0, 1),
        ("s0", 1, 2),
        ("s1", 0, 0),
        ("s2", 0, 1),
    ]
    for stack, a, _, matches in pairs:  # a grid's keypoints match those at their places
        assert matches.indices[0].tolist() == list(range(len(stack.keypoints[a])))


def test_matches_are_padded_with_no_partner() -> None:
    one = Matches(torch.tensor([[1, -1]]), torch.tensor([[-1, 0, -1]]))
    joined = stack_matches([one, Matches(torch.tensor([[0]]), torch.tensor([[0]]))], 4)
    assert joined.indices.tolist() == [[1, -1, -1, -1], [0, -1, -1, -1]]
    assert joined.inverse.tolist() == [[-1, 0, -1, -1], [0, -1, -1, -1]]


def test_a_resumed_run_is_the_uninterrupted_one(
    stacks: list[Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", stacks)
    with killed_after(1, monkeypatch):
        run(tmp_path / "killed", stacks)
    resumed = run(tmp_path / "killed", stacks, "--resume")
    assert whole.keys() == resumed.keys()
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_an_unfinished_run_is_not_replaced_by_another(
    stacks: list[Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(1, monkeypatch):
        run(tmp_path, stacks)
    with pytest.raises(
        ValueError, match=r"holds an unfinished run with other options: --lr 0\.002 then, 0.5 now; choose"
    ):
        run(tmp_path, stacks, "--lr", "0.5")


@pytest.mark.parametrize("model", ["unet", "fcn", "kaf-fcn", "kaf-unet", "swin-unet", "swin-unetr"])
def test_an_encoders_weights_fit_its_network(stacks: list[Stack], tmp_path: Path, model: str) -> None:
    learnt = run(tmp_path, stacks, "--model", model, "--scales", "1", "3")
    options = parse(PretrainOptions, [*SMALL, "--output", str(tmp_path), "--model", model, "--scales", "1", "3"])
    network = build_model(options)
    report = checkpoints.load_pretrained(network, tmp_path / "weights.pt")
    assert f"loaded {len(learnt)}: {'network.swinViT' if model == 'swin-unetr' else 'encoder.stages.0'}" in report
    assert "skipped 0: nothing" in report
    assert len(learnt) == len(network.encoder.state_dict())
    assert all(value.equal(network.state_dict()[name]) for name, value in learnt.items())


def test_slices_without_keypoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = volumes((3, 2))
    flat[0].image[1:] = 0
    monkeypatch.setattr("examples.protocol.experiments.inputs.load_volumes", lambda *_, **__: flat)
    stacks = load_stacks(parse(PretrainOptions, [*SMALL, "--output", "x"]))
    assert "s0: no keypoints in slices 1, 2" in capsys.readouterr().err
    assert all(value.isfinite().all() for value in run(tmp_path / "some", stacks).values())
    stacks = prepare(flat, no_keypoints, patch=(32, 32))
    assert all(value.isfinite().all() for value in run(tmp_path / "none", stacks).values())
