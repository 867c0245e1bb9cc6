"""Fine-tuning: resumed runs, several processes, pretrained weights, splits and bad input."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.protocol import files
from examples.protocol.volumes.splits import make_split, read_split, write_split
from examples.unet import UNet

pytest.importorskip("examples.protocol.experiments.finetuning", reason="the extra train is not here")
from examples.protocol import finetune  # after the skip
from examples.protocol.experiments.inference import predict
from examples.protocol.models.detectors import build_detector
from examples.protocol.models.networks import build_model
from examples.protocol.options import FinetuneOptions, parse, read_settings
from examples.protocol.training import augmentation, checkpoints, loop
from examples.protocol.training.batches import draw_batches
from examples.protocol.volumes.stacks import Stack, prepare
from examples.protocol.volumes.volume import Volume
from kaf_layer import GridDetector
from kaf_layer.attention import TransformerBlock

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--patch", "32", "32", "--width", "4", "--classes", "3", "--depth", "1", "--embed-dim", "8", "--folds", "2"]
SMALL += ["--batch", "4", "--epochs", "4", "--steps-per-epoch", "2", "--labelled", "1", "--save-every", "1"]


@pytest.fixture(scope="module")
def stacks() -> list[Stack]:
    """Four subjects of three slices of noise, with a square to find."""
    generator = torch.Generator().manual_seed(0)
    volumes = []
    for subject in "abcd":
        label = torch.zeros(3, 40, 28, dtype=torch.long)
        label[:, 10:20, 8:18], label[:, 22:26, 8:18] = 1, 2
        volumes.append(Volume(label + torch.randn(3, 40, 28, generator=generator), label, subject))
    return prepare(volumes, GridDetector(8), patch=(32, 32))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def run(folder: Path, stacks: list[Stack], *more: str) -> dict:
    return finetune.main([*SMALL, "--output", str(folder), *more], stacks=stacks)


@contextmanager
def killed_after(checkpoints: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs inside dies where it would write one checkpoint more."""
    save, saved = loop.save, []

    def killed(content: object, path: Path) -> None:
        if len(saved) == checkpoints:
            raise KeyboardInterrupt
        saved.append(path)
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_finished_run_is_not_replaced_by_another(stacks: list[Stack], tmp_path: Path) -> None:
    run(tmp_path, stacks)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for again in ([], ["--resume"]):
        with pytest.raises(
            ValueError, match=r"holds a finished run with other options: --width \d+ then, 8 now; choose"
        ):
            run(tmp_path, stacks, "--width", "8", *again)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_an_unfinished_run_is_not_replaced_by_another(
    stacks: list[Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with killed_after(1, monkeypatch):
        run(tmp_path, stacks)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"holds an unfinished run with other options: --lr 0\.003 then, 0.5 now; choose"
    ):
        run(tmp_path, stacks, "--lr", "0.5")
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    assert "starts over" not in capsys.readouterr().out
    run(tmp_path, stacks)  # what was refused has left nothing that blocks the same run
    assert (
        "the same run, killed after epoch 1. It starts over: to continue it, give --resume." in capsys.readouterr().out
    )


def test_a_checkpoint_of_another_run_is_not_resumed(
    stacks: list[Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(1, monkeypatch):
        run(tmp_path, stacks)
    with pytest.raises(ValueError, match=r"checkpoint\.pt was written with other options than these: --lr 0.003 then"):
        run(tmp_path, stacks, "--resume", "--lr", "0.5")


def test_a_resumed_run_is_the_uninterrupted_one(
    stacks: list[Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--drop-keypoints", "0.5", "--scales", "1", "2", "--token-loss", "0.5", "--share-attention"]
    run(tmp_path / "whole", stacks, *options)
    with killed_after(2, monkeypatch):
        run(tmp_path / "killed", stacks, *options)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    content = files.load(checkpoint)
    assert len(content["losses"]) == 2
    files.save(content | {"seconds": 1e4}, checkpoint)
    torch.manual_seed(99)
    result = run(tmp_path / "killed", stacks, *options, "--resume")
    assert result["training_seconds"] > 1e4  # those before the kill are counted
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(value.equal(resumed[name]) for name, value in whole.items())
    with pytest.raises(ValueError, match=r"--output .*killed holds a finished run.* --lr 0.003 then, 0.5 now; choose"):
        run(tmp_path / "killed", stacks, *options, "--resume", "--lr", "0.5")
    with pytest.raises(ValueError, match="weights of --pretrained differ"):
        run(tmp_path / "killed", stacks, *options, "--resume", "--pretrained", str(tmp_path / "whole" / "weights.pt"))
    write_split(make_split("abcd", folds=2, seed=5), tmp_path / "other.json", seed=5)
    with pytest.raises(ValueError, match=r"subjects .*--split.* differ"):
        run(tmp_path / "killed", stacks, *options, "--resume", "--split", str(tmp_path / "other.json"))
    run(tmp_path / "given", stacks, *options, "--split", str(tmp_path / "other.json"))
    assert (tmp_path / "given" / "split.json").read_text() == (tmp_path / "other.json").read_text()
    (tmp_path / "killed" / "result.json").write_text('{"settings')
    with pytest.raises(ValueError, match=r"result\.json is no JSON"):
        run(tmp_path / "killed", stacks, *options, "--resume")


def test_workers_load_the_same_batches(stacks: list[Stack], tmp_path: Path) -> None:
    """And draw nothing from the augmentation's random numbers."""
    for workers in "01":
        run(tmp_path / workers, stacks, "--workers", workers, "--drop-keypoints", "0.5")
    alone, helped = (weights(tmp_path / workers) for workers in "01")
    assert all(value.equal(helped[name]) for name, value in alone.items())


@pytest.mark.parametrize("model", ["unet", "unet-c2", "kaf-unet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_computes_the_same(model: str, dims: int) -> None:
    """Features and the gradients behind them stay channels last, and the output is the same."""
    size, form = (32, 48, 16)[:dims], (torch.channels_last, torch.channels_last_3d)[dims - 2]
    flags = ["--model", model, "--width", "4", "--depth", "1", "--embed-dim", "8", "--levels", "3", "--output", "x"]
    flags += ["--detector", "grid", "--spatial-dims", str(dims), "--patch", *map(str, size)]
    plain, last = (parse(FinetuneOptions, [*flags, *more]) for more in ([], ["--channels-last"]))
    networks = [build_model(options) for options in (plain, last)]
    networks[1].load_state_dict(networks[0].state_dict())
    images = torch.rand(2, 1, *size)
    keypoints = GridDetector(8)(images)
    exact = [deepcopy(network).double()(images.double(), keypoints) for network in networks]
    torch.testing.assert_close(*exact)
    networks[1](images, keypoints).square().mean().backward()
    kernels = [p for p in networks[1].encoder.parameters() if p.ndim == dims + 2 and min(p.shape) > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=form) and p.grad.is_contiguous(memory_format=form) for p in kernels)
    assert networks[1].encoder(images, keypoints).features[0].is_contiguous(memory_format=form)


def test_logs_and_progress(stacks: list[Stack], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, stacks, "--detector", "none", "--model", "kaf-fcn", "--scales", "2")
    logs = EventAccumulator(str(tmp_path)).Reload()
    loss, dice = logs.Scalars("loss"), logs.Scalars("dice")
    assert [scalar.step for scalar in loss] == [scalar.step for scalar in dice] == [1, 2, 3, 4]
    progress = capsys.readouterr().err
    assert f"loss={loss[-1].value:.3f}, dice={dice[-1].value:.3f}" in progress
    assert "32/32" in progress  # four epochs of two batches of four
    assert re.search(r"slices/s|s/ slices", progress)


def test_a_training_that_diverges_ends_with_advice(stacks: list[Stack], tmp_path: Path) -> None:
    arguments = [*SMALL, "--output", str(tmp_path)]
    with pytest.raises(FloatingPointError, match=r"loss of epoch \d is nan: try a lower --lr than 1e\+20"):
        finetune.main([*arguments, "--lr", "1e20"], stacks=stacks)
    assert not (tmp_path / "result.json").exists()
    finetune.main([*arguments, "--epochs", "1"], stacks=stacks)  # what failed has left nothing that blocks the next run


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    files.save({"a": torch.ones(2)}, path)
    with pytest.raises(AttributeError):
        files.save({"a": lambda: None}, path)
    assert files.load(path)["a"].equal(torch.ones(2))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"weights\.pt cannot be read"):
        files.load(path)


def test_the_result_is_of_the_unseen_subjects(stacks: list[Stack], tmp_path: Path) -> None:
    result = run(tmp_path, stacks, "--model", "unet")
    fold = read_split(tmp_path / "split.json", list("abcd"))[0]
    assert [row[0] for row in result["scores"]] == [row[0] for row in result["hd95"]] == fold.test
    assert result["settings"]["subjects"] == {"train": fold.train[:1], "test": fold.test}
    assert json.loads((tmp_path / "result.json").read_text())["dice"] == result["dice"]
    # Dice by hand, over the stacked slices of the whole volume.
    model = build_model(read_settings(FinetuneOptions, result["settings"], output=tmp_path))
    model.load_state_dict(weights(tmp_path))
    for name, *scores in result["scores"]:
        (stack,) = (s for s in stacks if s.volume.subject == name)
        predicted, label = predict(model, stack), stack.volume.label
        assert predicted.shape == label.shape
        for c, score in enumerate(scores, start=1):
            a, b = predicted == c, label == c
            assert score == pytest.approx((2 * (a & b).sum() / (a.sum() + b.sum())).item(), abs=1e-6)


def test_pretrained_weights_that_fit_in_part(tmp_path: Path) -> None:
    source, target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    files.save(source.state_dict(), tmp_path / "w.pt")
    text = checkpoints.load_pretrained(target, tmp_path / "w.pt")
    assert text.splitlines()[1:] == [
        "  loaded 2: 0.weight, 0.bias",
        "  skipped 2: 1.weight (4, 3), 1.bias (4,)",
        "  missing 2: 1.weight, 1.bias",
    ]
    assert target[0].weight.equal(source[0].weight)
    with pytest.raises(ValueError, match=r"w\.pt holds no weights that fit"):
        checkpoints.load_pretrained(nn.Linear(7, 7), tmp_path / "w.pt")
    files.save(UNet(width=4).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"it holds \['encoder.* \(4, 1, 3, 3\)'.* the network has .* \(8, 1, 3, 3\)'"):
        checkpoints.load_pretrained(UNet(width=8), tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pt"):
        checkpoints.digest(tmp_path / "none.pt")


def test_the_papers_recipe() -> None:
    for preset, lr, epochs in (("acdc", 5e-4, 200), ("chd", 5e-5, 100)):
        options = parse(FinetuneOptions, ["--preset", preset, "--output", "x"])
        assert (options.lr, options.epochs, options.batch, options.folds) == (lr, epochs, 10, 5)
        assert (options.scales, options.fusion, options.loss) == ((0, 1, 2, 3), "concat", "ce")
        assert (options.resize, options.levels, options.depth, options.detector) == (1.0, 5, 6, "sift")
    assert parse(FinetuneOptions, ["--preset", "acdc", "--output", "x", "--lr", "0.1"]).lr == 0.1


def test_the_learning_rate_falls_along_a_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.002)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for step in range(11):
        assert loop.cosine(0.002, step / 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize(("count", "size", "steps"), [(7, 3, 5), (3, 10, 2), (10, 5, 2)])
def test_every_sample_is_drawn_before_any_is_drawn_again(count: int, size: int, steps: int) -> None:
    chosen = draw_batches(count, size, steps, seed=1)
    assert [len(batch) for batch in chosen] == [size] * steps
    drawn = list(chain(*chosen))
    for start in range(0, len(drawn), count):
        part = drawn[start : start + count]
        assert len(set(part)) == len(part)
    assert draw_batches(count, size, steps, seed=1) == chosen
    assert draw_batches(count, size, steps, seed=2) != chosen


def test_ablations_by_flag() -> None:
    flags = ["--output", "x", "--width", "4", "--embed-dim", "8", "--scales", "1", "3", "--depth", "3"]
    options = parse(FinetuneOptions, flags)
    layers = build_model(options).encoder.layers
    assert list(layers) == ["1", "3"]
    blocks = [m for m in layers.modules() if isinstance(m, TransformerBlock)]
    assert len(blocks) == 2 * 3
    image = torch.zeros(1, 1, 24, 36)
    options = parse(FinetuneOptions, [*flags, "--detector", "grid", "--spacing", "12"])
    assert build_detector(options)(image).valid.sum() == 6
    options = parse(FinetuneOptions, [*flags, "--detector", "none"])
    assert not build_detector(options)(image).valid.any()
    options = parse(FinetuneOptions, [*flags[:6], "--levels", "3", "--depth", "1"])
    assert list(build_model(options).encoder.layers) == ["0", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scales", "4"], r"--scales must be among 0 to 3, got \[4\]"),
        (["--levels", "3", "--scales", "2"], r"--scales must be among 0 to 1, got \[2\]"),
        (["--levels", "2"], "--levels must be 3 or more, got 2"),
        (["--levels", "6", "--patch", "64", "48"], r"--levels 6 needs a --patch divisible by 32, got \[64, 48\]"),
        (["--model", "swin-unet", "--patch", "64", "48"], r"--model swin-unet needs a --patch divisible by 32"),
        (
            ["--detector", "disk"],
            "--detector-weights are for disk, dedode, aliked, keynet, superpoint, which need",
        ),
        (["--detector-weights", "x.pt"], "--detector-weights are for disk, .* got sift"),
        (["--workers", "-1"], "--workers must be 0 or more, got -1"),
        (["--resize", "0"], "--resize must be a factor above 0, got 0.0"),
        (["--drop-keypoints", "1.5"], "--drop-keypoints must be a share from 0 to 1, got 1.5"),
    ],
)
def test_options_that_do_not_fit_together(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(FinetuneOptions, ["--output", "x", *flags])


def test_losses(stacks: list[Stack], tmp_path: Path) -> None:
    """--loss is MONAI's: at a learning rate of zero, batch norms aside, only the loss differs."""
    first = {
        loss: run(tmp_path / loss, stacks, "--loss", loss, "--lr", "0", "--epochs", "1")["losses"][0]
        for loss in ("ce", "dice_ce")
    }
    assert 0.3 < first["dice_ce"] - first["ce"] <= 1


def test_keypoints_can_be_dropped_or_found_anew() -> None:
    images = torch.rand(300, 1, 32, 48)
    keypoints = GridDetector(8)(images)
    torch.manual_seed(0)
    _, dropped, _ = augmentation.Augmentation(drop_keypoints=0.5)(images, keypoints)
    torch.manual_seed(0)
    _, kept, _ = augmentation.Augmentation()(images, keypoints)
    shares = dropped.valid.sum(1) / kept.valid.sum(1)
    assert shares.mean() == pytest.approx(0.75, abs=0.03)
    assert shares.min() < 0.6
    assert shares.max() > 0.9
    assert not (dropped.valid & ~kept.valid).any()
    _, found, _ = augmentation.Augmentation(detector=GridDetector(8))(images, keypoints)
    assert torch.equal(found.positions, keypoints.positions)
    assert not torch.equal(kept.positions, keypoints.positions)


def test_nothing_tells_where_the_frame_was() -> None:
    """What comes into view has the image's own grey levels: none is far from those that were there."""
    torch.manual_seed(0)
    images = 5 + torch.rand(20, 1, 32, 48)
    moved, *_ = augmentation.Augmentation().move(images, GridDetector(8)(images))
    assert moved.min() >= 5


def test_splits_can_be_given_back(tmp_path: Path) -> None:
    names = [f"s{i}" for i in range(11)]
    split = make_split([*names, *names], folds=5, seed=3)
    assert sorted(name for fold in split for name in fold.test) == sorted(names)
    assert all(sorted(fold.train + fold.test) == sorted(names) for fold in split)
    assert split != make_split(names, folds=5, seed=4)
    write_split(split, tmp_path / "split.json", seed=3)
    assert read_split(tmp_path / "split.json", names) == split
    with pytest.raises(ValueError, match=r"split\.json names subjects"):
        read_split(tmp_path / "split.json", names[1:])
    with pytest.raises(ValueError, match="the fold has 8 subjects to train on, got 9"):
        split[0].labelled(9)
    with pytest.raises(ValueError, match="got folds=5 for 4"):
        make_split(names[:4], folds=5)
    (tmp_path / "split.json").write_text('{"folds": [{"train": ["s1"], "test": ["s1"]}]}')
    with pytest.raises(ValueError, match=r"trains and tests on the same subjects in fold 0: \['s1'\]"):
        read_split(tmp_path / "split.json", names)
    (tmp_path / "split.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a split"):
        read_split(tmp_path / "split.json", names)


def test_sunnybrooks_defaults_were_chosen_on_other_subjects() -> None:
    """Than those that folds 0 and 1 of the split test."""
    results = ROOT / "benchmarks" / "results"
    outer, inner = (
        json.loads((results / f"sunnybrook-{n}.json").read_text())["folds"] for n in ("split", "inner-split")
    )
    seen = {name for fold in inner for name in fold["train"] + fold["test"]}
    assert len(seen) == 18
    assert not seen.intersection(outer[0]["test"] + outer[1]["test"])
    names = [name for fold in outer for name in fold["test"]]
    assert [fold._asdict() for fold in make_split(names, folds=5, seed=0)] == outer


@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_two_processes(script: str, tmp_path: Path) -> None:
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launch += " --mixed_precision no --dynamo_backend no"
    small = "--limit 4 --folds 2 --patch 32 32 --width 4 --depth 1 --embed-dim 8 --epochs 1 --steps-per-epoch 2"
    small += " --batch 4 --detector grid --output"
    process = subprocess.Popen(
        [sys.executable, *launch.split(), "-m", f"examples.protocol.{script}", *small.split(), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.terminate()  # not killed, so that it ends its own two
    assert process.returncode == 0, err[-2000:]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert out.count("2 processes on cpu") == 1  # one of them speaks


def test_the_same_weights_are_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever process wrote them: a fine-tuning is known by the content of the weights that it starts from."""
    digests = set()
    for process in (1, 22):
        monkeypatch.setattr(files.os, "getpid", lambda process=process: process)
        files.save({"weight": torch.arange(5.0)}, tmp_path / f"{process}.pt")
        digests.add(checkpoints.digest(tmp_path / f"{process}.pt"))
    assert len(digests) == 1
    assert checkpoints.digest(None) is None
