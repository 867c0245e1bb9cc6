"""Cross-validation: the table says what the runs gave, and the figures show them."""

import json
import shutil
from pathlib import Path
from statistics import mean

import pytest

cross_validate = pytest.importorskip("cross_validate", reason="the extra train is not here")

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
    for expected in ("- seed: 0", "phantoms, 3 subjects", "torch ", "KAF-UNet, pretrained by KAF", "Dice of class 3"):
        assert expected in text
    kept = (tmp_path / "fold1" / "kaf-unet+kaf" / "M1" / "weights.pt").stat().st_mtime_ns
    with pytest.raises(ValueError, match="holds runs with another width and finetune: choose"):
        cross_validate.main([*arguments, *methods, "--finetune", "--epochs 2 --batch 4", "--width", "8"])
    split = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({"folds": split["folds"][::-1]}))
    with pytest.raises(ValueError, match="holds runs with another split: choose"):
        cross_validate.main([*arguments, *methods, "--split", str(tmp_path / "other.json")])
    assert json.loads((tmp_path / "split.json").read_text()) == split
    assert cross_validate.main([*arguments, *methods]) == results  # nothing is done twice
    assert (tmp_path / "fold1" / "kaf-unet+kaf" / "M1" / "weights.pt").stat().st_mtime_ns == kept

    figures = pytest.importorskip("figures", reason="the extra plot is not here")
    capsys.readouterr()
    runs = [str(tmp_path / "fold1" / name / "M1") for name in methods[1:]]
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


def test_means_and_deviations() -> None:
    def result(fold: int, *scores: float) -> dict:
        rows = [["a", *scores], ["b", *scores]]
        return {"method": "unet", "fold": fold, "M": 1, "scores": rows, "parameters": 2e6, "training_seconds": 3.0}

    results = [result(0, 0.5, 0.7), result(1, 0.7, 0.9)]
    lines = cross_validate.table(results, {"Theirs": {"1": 0.25}, "Others'": {"6": 0.5}}).splitlines()
    rows = [line for line in lines if line.startswith("| UNet")]
    assert rows[0] == f"| UNet | 2.00 M | {mean([0.6, 0.8]):.3f} ± 0.141 | 3 s |"
    assert rows[1] == "| UNet | 2.00 M | 0.600 ± 0.141 | 3 s |"
    assert rows[2] == "| UNet | 2.00 M | 0.800 ± 0.141 | 3 s |"
    assert [line for line in lines if "their" in line.lower() or "others" in line.lower()] == [
        "| Theirs | | 0.250 | |",
        "| Others' | |  | |",
    ]
    assert cross_validate.spread([0.25]) == "0.250"
    assert cross_validate.spread([0.25, float("nan"), 0.75]) == "0.500 ± 0.354"
    assert cross_validate.spread([float("nan")]) == "nan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test-folds", "2"], "--test-folds must be among 0 to 1"),
        (["--labelled", "9"], "subjects to train on, got 9"),
        (["--labelled", "1", "0"], "subjects to train on, got 0"),
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
    assert "with or without +pcl or +kaf" in capsys.readouterr().err


def test_what_belongs_to_all_scripts_is_not_given_to_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cross_validate.main([*SMALL, "--output", str(tmp_path), "--finetune", "--epochs 1 --detector=none --fold 1"])
    assert "--detector=none, --fold must be given to all scripts" in capsys.readouterr().err
