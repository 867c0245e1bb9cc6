"""Predictions lie on their images in the world, however these are stored; they go on, and refuse what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="the extra train is not here")
prediction = pytest.importorskip(
    "examples.protocol.experiments.prediction", reason="the extras train and plot are not here"
)
from test_nifti import stored, write_pair  # noqa: E402  # after the skip

from examples.protocol import finetune, predict  # noqa: E402

SMALL = ["--model", "unet", "--patch", "32", "24", "--width", "8", "--levels", "3", "--classes", "3", "--folds", "2"]
SMALL += ["--detector", "none", "--loss", "dice_ce", "--lr", "0.01", "--batch", "4", "--epochs", "4"]
SMALL += ["--steps-per-epoch", "20", "--labelled", "2"]
ORIENTATIONS = ("RAS", "LPS", "PLI", "ARS")  # whose slices lie across the third axis, head to feet


def body(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A subject along R, A and S: two parts, one brighter, at a side and at a height that no mirror image has."""
    rng = np.random.default_rng(seed)
    label = np.zeros((24, 30, 4), np.uint8)
    x, y = rng.integers(3, 6, 2)
    label[x : x + 6, y : y + 12, 1:] = 1
    label[x + 6 : x + 12, y : y + 5, 2:] = 2
    return (label + 0.3 * rng.normal(size=label.shape)).astype(np.float32), label


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for seed in range(4):
        image, label = body(seed)
        write_pair(folder / "data", f"s{seed}", stored(image, "RAS"), stored(label, "RAS"))
    finetune.main([*SMALL, "--data", str(folder / "data"), "--output", str(folder / "run")])
    return folder / "run" / "weights.pt"


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Unseen subjects stored in several ways; the labels of one are not there."""
    for seed, codes in enumerate(ORIENTATIONS, start=10):
        image, label = body(seed)
        write_pair(tmp_path / "data", f"new-{codes}", stored(image, codes), stored(label, codes))
    (tmp_path / "data" / "labels" / "new-ARS.nii.gz").unlink()
    return tmp_path / "data"


def run(weights: Path, data: Path, *more: str) -> dict:
    output = str(data.parent / "predicted")
    return predict.main(["--weights", str(weights), "--data", str(data), "--output", output, *more])


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_predictions_lie_on_their_images(weights: Path, volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(weights, volumes)
    assert json.loads(weights.with_name("result.json").read_text())["axes"] == "RAS"
    found = {name: entry for name, entry in record["volumes"].items() if "dice" in entry}
    assert found.keys() == {f"new-{codes}" for codes in ORIENTATIONS[:3]}
    for seed, codes in enumerate(ORIENTATIONS, start=10):
        image = nibabel.load(volumes / "images" / f"new-{codes}.nii.gz")
        prediction = nibabel.load(volumes.parent / "predicted" / f"new-{codes}.nii.gz")
        assert prediction.shape == image.shape
        assert (prediction.affine == image.affine).all()
        assert prediction.get_data_dtype() == np.uint8
        assert [prediction.header[code] for code in ("qform_code", "sform_code", "xyzt_units")] == [
            image.header[code] for code in ("qform_code", "sform_code", "xyzt_units")
        ]
        # Against the truth as it is stored along R, A and S.
        turned = np.asarray(nibabel.as_closest_canonical(prediction).dataobj)
        truth = body(seed)[1]
        for c in (1, 2):
            assert dice(turned == c, truth == c) > 0.9
        for axis in range(3):
            assert min(dice(np.flip(turned, axis) == c, truth == c) for c in (1, 2)) < 0.8
        if entry := found.get(f"new-{codes}"):
            assert entry["dice"] == pytest.approx([dice(turned == c, truth == c) for c in (1, 2)])
            assert max(entry["hd95"]) < 9  # millimetres: a slice, at most
        assert (volumes.parent / "predicted" / f"new-{codes}.png").stat().st_size > 10_000
    assert "4 volumes; Dice 0.9" in capsys.readouterr().out


def test_what_was_killed_goes_on(weights: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(weights, volumes, "--output", str(volumes.parent / "whole"))
    segment, seen = prediction.segment, []

    def killed(source: object, *rest: object) -> dict:
        seen.append(source)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return segment(source, *rest)

    monkeypatch.setattr(prediction, "segment", killed)
    with pytest.raises(KeyboardInterrupt):
        run(weights, volumes)
    kept = {path: path.stat().st_mtime_ns for path in (volumes.parent / "predicted").glob("*.nii.gz")}
    assert len(kept) == 2
    next(iter(kept)).unlink()  # and one was lost
    kept.pop(next(iter(kept)))
    assert run(weights, volumes)["volumes"] == whole["volumes"]
    assert len(seen) == 3 + 3
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    for path in (volumes.parent / "whole").glob("*.nii.gz"):
        assert path.read_bytes() == (volumes.parent / "predicted" / path.name).read_bytes()


def test_files_without_any_list(weights: Path, volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one name in several folders; one has a header of its own."""
    for number, name in enumerate(("new-LPS", "new-PLI")):
        (volumes / f"case{number}").mkdir()
        (volumes / "images" / f"{name}.nii.gz").rename(volumes / f"case{number}" / "scan.nii.gz")
    for folder in ("images", "labels"):
        for file in (volumes / folder).iterdir():
            file.unlink()
        (volumes / folder).rmdir()
    record = run(weights, volumes)
    assert record["volumes"].keys() == {"case0_scan", "case1_scan"}
    assert all(entry.keys() == {"image"} for entry in record["volumes"].values())
    assert "2 volumes\n" in capsys.readouterr().out
    (volumes / "case0" / "scan.nii.gz").write_bytes((volumes / "case1" / "scan.nii.gz").read_bytes())
    with pytest.raises(ValueError, match="predicted holds the prediction of another image case0_scan"):
        run(weights, volumes)


def test_what_does_not_fit_is_refused(weights: Path, volumes: Path, tmp_path: Path) -> None:
    run(weights, volumes, "--limit", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "predicted").iterdir()}
    with pytest.raises(ValueError, match=r"predicted holds predictions with other --window-level: choose another"):
        run(weights, volumes, "--window-level", "0", "2")
    other = tmp_path / "other"
    quick = ["--width", "4", "--epochs", "1", "--steps-per-epoch", "1", "--data", str(weights.parents[1] / "data")]
    finetune.main([*SMALL, *quick, "--output", str(other)])
    with pytest.raises(ValueError, match=r"predicted holds predictions with other --weights: choose another"):
        run(other / "weights.pt", volumes)
    with pytest.raises(ValueError, match=r"--output .* must lie outside of --data"):
        run(weights, volumes, "--output", str(volumes / "predicted"))
    with pytest.raises(ValueError, match="--limit must be at least one volume, got 0"):
        run(weights, volumes, "--limit", "0")
    with pytest.raises(ValueError, match="--window-level must be LOW HIGH, the lower end first, got 2 0"):
        run(weights, volumes, "--window-level", "2", "0")
    assert before == {path: path.read_bytes() for path in (tmp_path / "predicted").iterdir()}
    (other / "weights.pt").write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match=r"other.weights\.pt are not the weights of the network of .*result\.json"):
        run(other / "weights.pt", volumes)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pt"):
        run(other / "none.pt", volumes)
    (other / "result.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"other.weights\.pt has no result\.json next to it"):
        run(other / "weights.pt", volumes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--data .*empty must hold"):
        run(weights, tmp_path / "empty")
    with pytest.raises(ValueError, match="are of 3 classes, phantoms have more: give --data"):
        predict.main(["--weights", str(weights), "--output", str(tmp_path / "phantoms")])


def test_volumes_in_one_piece(weights: Path, volumes: Path, tmp_path: Path) -> None:
    """A network for volumes; what it says of them counts elsewhere."""
    whole = [
        "--spatial-dims",
        "3",
        "--patch",
        "4",
        "32",
        "24",
        "--epochs",
        "1",
        "--steps-per-epoch",
        "1",
        "--batch",
        "1",
    ]
    run_of = ["--data", str(weights.parents[1] / "data"), "--output", str(tmp_path / "run")]
    finetune.main([*SMALL, *whole, *run_of])
    assert len(run(tmp_path / "run" / "weights.pt", volumes)["volumes"]) == 4
    for codes in ORIENTATIONS:
        image, prediction = (
            nibabel.load(folder / f"new-{codes}.nii.gz") for folder in (volumes / "images", tmp_path / "predicted")
        )
        assert prediction.shape == image.shape
        assert (prediction.affine == image.affine).all()


def test_slices_of_another_plane(weights: Path, tmp_path: Path) -> None:
    image, label = body(0)
    write_pair(tmp_path / "data", "sagittal", stored(image, "PIL"), stored(label, "PIL"))
    with pytest.raises(
        ValueError, match=r"sagittal\.nii\.gz has slices of another .* ASR and not RAS: give --orientation RAS"
    ):
        run(weights, tmp_path / "data")
    (entry,) = run(weights, tmp_path / "data", "--orientation", "RAS", "--output", str(tmp_path / "turned"))[
        "volumes"
    ].values()
    assert min(entry["dice"]) > 0.9
    assert nibabel.load(tmp_path / "turned" / "sagittal.nii.gz").shape == (30, 4, 24)
