"""Cross-validation: the table says what the runs gave, and the figures show them."""

import json
import re
import shlex
import shutil
from math import inf, isnan, nan
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest
import torch

cross_validation = pytest.importorskip(
    "examples.protocol.experiments.cross_validation", reason="the extra train is not here"
)
from examples.protocol import cross_validate, curves, figures  # noqa: E402  # after the skip
from examples.protocol.options import FigureOptions, FinetuneOptions, PretrainOptions, parse, table  # noqa: E402
from examples.protocol.results import comparison, tables  # noqa: E402

SMALL = ["--limit", "3", "--folds", "2", "--patch", "64", "64", "--width", "4", "--depth", "1", "--embed-dim", "8"]
SMALL += ["--steps-per-epoch", "1", "--finetune", "--epochs 1 --batch 4", "--pretrain", "--epochs 1 --batch 2"]


def test_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--output", str(tmp_path), "--labelled", "1", "--test-folds", "1"]
    methods = ["--methods", "swin-unetr", "unet+pcl", "kaf-unet+kaf"]
    results = cross_validate.main([*arguments, *methods])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [(r["method"], r["fold"], r["M"]) for r in results] == [(m, 1, 1) for m in methods[1:]]
    text = (tmp_path / "table.md").read_text()
    assert f"| {results[0]['dice']:.3f} |" in text
    for expected in (
        "- seeds: 0",
        "phantoms, 3 subjects",
        "torch ",
        "KAF-UNet, pretrained by KAF",
        "Dice of class 3",
        "95th",
    ):
        assert expected in text
    kept = (tmp_path / "fold1" / "kaf-unet+kaf" / "seed0" / "M1" / "weights.pt").stat().st_mtime_ns
    with pytest.raises(ValueError, match="holds runs with another width and finetune: choose"):
        cross_validate.main([*arguments, *methods, "--finetune", "--epochs 2 --batch 4", "--width", "8"])
    split = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({"folds": split["folds"][::-1]}))
    with pytest.raises(ValueError, match="holds runs with another split: choose"):
        cross_validate.main([*arguments, *methods, "--split", str(tmp_path / "other.json")])
    assert json.loads((tmp_path / "split.json").read_text()) == split
    assert cross_validate.main([*arguments, *methods]) == results  # nothing is done twice
    assert (tmp_path / "fold1" / "kaf-unet+kaf" / "seed0" / "M1" / "weights.pt").stat().st_mtime_ns == kept

    drawing = pytest.importorskip("examples.protocol.drawing.figures", reason="the extra plot is not here")
    capsys.readouterr()
    runs = [str(tmp_path / "fold1" / name / "seed0" / "M1") for name in methods[1:]]
    figures.main(["--limit", "3", "--output", str(tmp_path / "figures"), "--runs", *runs])
    names = {path.stem: path.stat().st_size for path in (tmp_path / "figures").glob("*.png")}
    assert names.keys() == {"keypoints", "correspondences", "threshold", "segmentations", "similarity"}
    assert min(names.values()) > 10_000
    other = shutil.copytree(runs[0], tmp_path / "other")
    text = (other / "result.json").read_text()
    (other / "result.json").write_text(text.replace('"detector": "sift"', '"detector": "grid"'))
    with pytest.raises(ValueError, match=r"--runs must share their --detector, got \['sift', 'grid'\]"):
        figures.main(["--limit", "3", "--output", str(tmp_path), "--runs", runs[0], str(other)])
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        figures.main(["--limit", "3", "--output", str(tmp_path), "--runs", str(tmp_path)])
    figures_of_a_table(drawing, tmp_path, results)


def figures_of_a_table(drawing: ModuleType, folder: Path, results: list[dict]) -> None:
    """The methods of a cross-validation side by side, with the Dice that their results say."""
    arguments = ["--limit", "3", "--table", str(folder), "--output", str(folder / "chosen")]
    options = parse(FigureOptions, ["segmentations", *arguments, "--fold", "1"])
    runs = [drawing.named(path) for path in drawing.folders(options)]
    assert [name for name, _ in runs] == ["SwinUNETR", "UNet,\npretrained by PCL", "KAF-UNet,\npretrained by KAF"]
    stacks = drawing.load(options, [run for _, run in runs])
    drawn = drawing.draw_segmentations(stacks, runs)
    texts = [axis.texts[0].get_text() for axis in drawn.axes if axis.texts and "Dice" in axis.texts[0].get_text()]
    by_volume = zip(*(result["scores"] for result in results), strict=True)
    scores = [mean(score for score in row[1:] if not isnan(score)) for rows in by_volume for row in rows]
    assert texts == [f"Dice {score:.2f}" for score in scores]
    assert {stack.volume.subject for stack in stacks} == {row[0] for row in results[0]["scores"]}
    figures.main(["threshold", "--limit", "1", "--patch", "64", "64", "--output", str(folder / "chosen")])
    assert [path.name for path in (folder / "chosen").iterdir()] == ["threshold.png"]
    with pytest.raises(ValueError, match=r"--table .* no run of --fold 0, .* folds \[1\], seeds \[0\] and M = \[1\]"):
        figures.main(["segmentations", *arguments])
    with pytest.raises(FileNotFoundError, match=r"--table .* has no results\.json"):
        figures.main(["--table", str(folder / "fold1"), "--output", str(folder / "chosen")])
    with pytest.raises(ValueError, match="segmentations of networks: give --table or --runs"):
        figures.main(["segmentations", "--output", str(folder / "chosen")])
    with pytest.raises(SystemExit):
        figures.main(["segmentation", "--output", str(folder / "chosen")])


def test_distances_say_what_was_missed() -> None:
    def result(fold: int, seed: int, *distances: float) -> dict:
        return {"method": "unet", "fold": fold, "seed": seed, "M": 1, "hd95": [["a", *distances], ["b", *distances]]}

    results = [result(0, 0, 4.0, nan), result(0, 1, inf, nan), result(1, 0, 6.0, 8.0)]
    assert tables.distances(results)[-1] == f"| UNet | {mean([4, 7]):.1f} ± 2.1, 2 missed |"
    assert tables.distances([result(0, 0, inf, inf)])[-1] == "| UNet | none found, 4 missed |"
    assert tables.distances([{"fold": 0}]) == []


def test_means_and_deviations() -> None:
    def result(fold: int, *scores: float) -> dict:
        rows = [["a", *scores], ["b", *scores]]
        return {
            "method": "unet",
            "fold": fold,
            "seed": 0,
            "M": 1,
            "scores": rows,
            "parameters": 2e6,
            "training_seconds": 3.0,
        }

    results = [result(0, 0.5, 0.7), result(1, 0.7, 0.9)]
    lines = tables.table(results, {"Theirs": {"1": 0.25}, "Others'": {"6": 0.5}}).splitlines()
    rows = [line for line in lines if line.startswith("| UNet")]
    assert rows[0] == f"| UNet | 2.00 M | {mean([0.6, 0.8]):.3f} ± 0.141 | 3 s |"
    assert rows[1] == "| UNet | 2.00 M | 0.600 ± 0.141 | 3 s |"
    assert rows[2] == "| UNet | 2.00 M | 0.800 ± 0.141 | 3 s |"
    assert [line for line in lines if "their" in line.lower() or "others" in line.lower()] == [
        "| Theirs | | 0.250 | |",
        "| Others' | |  | |",
    ]
    assert comparison.spread([0.25]) == "0.250"
    assert comparison.spread([0.25, float("nan"), 0.75]) == "0.500 ± 0.354"
    assert comparison.spread([float("nan")]) == "nan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test-folds", "2"], "--test-folds must be among 0 to 1"),
        (["--labelled", "9"], "subjects to train on, got 9"),
        (["--labelled", "1", "0"], "subjects to train on, got 0"),
        (["--reference", "swin-unetr"], "--reference must be among --methods, got 'swin-unetr'"),
        (["--levels", "8"], "--levels 8 needs a --patch divisible by 128"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cross_validate.main([*SMALL, "--output", str(tmp_path), *arguments])


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it with python"):
        cross_validate.main([*SMALL, "--output", str(tmp_path)])


@pytest.mark.parametrize("text", ["[]", '{"a": {"x": 1}}', '{"a": 0.5}', "{", None])
def test_published_rows_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        cross_validate.main([*SMALL, "--output", str(tmp_path), "--beside", str(path)])
    assert "rows.json must hold" in capsys.readouterr().err


def test_unknown_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cross_validate.main([*SMALL, "--output", str(tmp_path), "--methods", "unet+magic"])
    assert "or without +kaf, +pcl, +simclr, +rotation, +pirl, +glcl-global, +glcl, +caid" in capsys.readouterr().err


def test_what_belongs_to_all_scripts_is_not_given_to_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cross_validate.main([*SMALL, "--output", str(tmp_path), "--finetune", "--epochs 1 --detector=none --fold 1"])
    assert "--detector=none, --fold must be given to all scripts" in capsys.readouterr().err


def test_options_of_fine_tuning_need_no_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cross_validation, "run_folds", lambda _, own, __: seen.append(own.finetuning) or [])
    monkeypatch.setattr(cross_validation, "report", lambda *_, **__: "")
    short = [*SMALL[: SMALL.index("--finetune")], "--labelled", "1", "--output", str(tmp_path)]
    cross_validate.main([*short, "--epochs", "2", "--lr", "0.01", "--finetune", "--batch 4"])
    assert seen == [["--epochs", "2", "--lr", "0.01", "--batch", "4"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1", "1", "0"], 'pretraining, give it as --pretrain "--weights ..."'),
        (["--loss", "magic"], "argument --loss: invalid choice: 'magic'"),
        (["--methods", "unet --colour red"], "unrecognized arguments: --colour red"),
    ],
)
def test_options_that_are_refused_leave_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cross_validate.main([*SMALL, *options, "--output", str(tmp_path / "table")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


def test_published_rows_of_other_numbers_of_subjects(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"Theirs": {"3": 0.5, "12": 0.6}}')
    with pytest.raises(ValueError, match=r"--beside has rows for M = \[3, 12\], none .* --labelled .* got \[1\]"):
        cross_validate.main([*SMALL, "--output", str(tmp_path), "--labelled", "1", "--beside", str(path)])


def test_methods_with_options_and_seeds(tmp_path: Path) -> None:
    methods = ["unet", "kaf-unet", "kaf-unet --fusion add --detector none --lr 0.01"]
    arguments = [*SMALL, "--output", str(tmp_path), "--labelled", "1", "--seeds", "0", "1", "--test-folds", "0"]
    results = cross_validate.main([*arguments, "--methods", *methods])
    assert [(r["method"], r["seed"], r["settings"]["fusion"]) for r in results] == [
        (name, seed, "add" if "add" in name else "concat") for name in methods for seed in (0, 1)
    ]
    assert results[0]["losses"] != results[1]["losses"]
    text = (tmp_path / "table.md").read_text()
    assert [r["settings"]["lr"] for r in results] == [0.003] * 4 + [0.01] * 2  # of fine-tuning alone
    assert "| KAF-UNet, --fusion add --detector none --lr 0.01 |" in text
    assert "KAF-UNet ahead of (Dice, mean over subjects; p; folds)" in text
    drawing = pytest.importorskip("examples.protocol.drawing.curves", reason="the extra plot is not here")
    curves.main([str(tmp_path)])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    (axis,) = drawing.draw_curves(results).axes
    assert axis.lines[0].get_ydata() == pytest.approx([mean(r["losses"][0] for r in results[:2])])
    with pytest.raises(SystemExit):
        cross_validate.main([*arguments, "--methods", "unet", "--fussion add"])


@pytest.mark.parametrize("preset", ["acdc", "chd"])
def test_the_papers_rows_stand_beside_its_presets(preset: str) -> None:
    rows = table.published(str(table.PUBLISHED / f"{preset}.json"))
    assert all("the paper's" in name and 0 < dice < 1 for name, row in rows.items() for dice in row.values())
    source = Path(__file__).parents[2] / "shared" / "paper" / f"{preset}.json"
    if not source.is_file():
        pytest.skip("the paper's numbers are not beside the project")
    assert list(rows.values()) == list(json.loads(source.read_text()).values())


def test_synapse_from_its_archive_to_the_table(tmp_path: Path) -> None:
    """Files named and scaled as there; the table has the paper's Table 6 beside ours."""
    from test_data import write

    generator = torch.Generator().manual_seed(0)
    for number in range(1, 5):
        label = torch.zeros(32, 32, 2)
        label[8:20, 8:24] = 13
        image = 40 * label.sign() + 30 * torch.randn(label.shape, generator=generator)
        image[:4] = 3000.0  # metal, beyond the window
        write(tmp_path / "Training" / "img" / f"img{number:04}.nii.gz", image.short().numpy())
        write(tmp_path / "Training" / "label" / f"label{number:04}.nii.gz", label.byte().numpy())
    arguments = ["--preset", "synapse", "--data", str(tmp_path), "--output", str(tmp_path / "table"), "--folds", "2"]
    arguments += ["--patch", "32", "32", "--levels", "3", "--width", "4", "--test-folds", "0", "--labelled", "2"]
    short = "--epochs 1 --batch 2 --steps-per-epoch 1"
    (result,) = cross_validate.main([*arguments, "--methods", "unet", "--finetune", short])
    assert result["settings"]["window_level"] == [-125, 275]
    assert [row[0][:3] for row in result["scores"]] == ["img"] * 2
    rows = json.loads((table.PUBLISHED / "synapse.json").read_text())
    assert len(rows) == 8
    text = (tmp_path / "table" / "table.md").read_text()
    assert all(f"| {name} | | {row['2']:.3f} | |" in text for name, row in rows.items())
    source = Path(__file__).parents[2] / "shared" / "paper" / "ablations.json"
    if source.is_file():
        assert [row["2"] for row in rows.values()] == list(
            json.loads(source.read_text())["table 6, Synapse CT (M=2)"].values()
        )


def ablations() -> list[str]:
    text = (Path(cross_validate.__file__).parent / "ABLATIONS.md").read_text()
    return re.findall(r"`(--methods .*)` \|$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("line", ablations())
def test_the_ablations_are_commands(line: str) -> None:
    """Every line parses, for every script that it would start, with the presets of the paper."""
    for preset in ("acdc", "chd", "phantom"):
        arguments = ["--preset", preset, "--labelled", "6", "--output", "x", *shlex.split(line)]
        own, shared, _ = table.parse_table(arguments)
        for name in own.methods:
            model, pretraining, more = table.parts(name)
            common = [*shared, "--model", model, "--output", "x", *more]
            parse(FinetuneOptions, [*common, *own.finetuning])
            if pretraining:
                options = parse(PretrainOptions, [*common, *own.pretrain, "--method", pretraining])
                assert options.method == pretraining


def test_the_papers_ablations_are_all_there() -> None:
    lines = ablations()
    assert len(lines) > 15
    for expected in (
        "--scales 0 1 3",
        "--depth 9",
        "--weights 0 1 0",
        "--max-distance 5",
        "--detector disk",
        "kaf-fcn",
    ):
        assert any(expected in line for line in lines), expected
