"""benchmarks/speed/gpu.py, rehearsed on a CPU: every part at its smallest."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common import harness
from benchmarks.speed import allocator, gpu, ways


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tables go; every run is made once and takes its number's seconds."""

    def once(runs: dict, **_: int) -> dict[str, float]:
        return {name: (run(), float(i))[1] for i, (name, run) in enumerate(runs.items(), 1)}

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "compare", once)
    monkeypatch.setattr(ways, "compare", once)
    return tmp_path


def rows_of(part: str, results: Path) -> list[dict]:
    gpu.main([part, "--small"])
    (path,) = results.glob(f"gpu-{part}-*.json")
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("part", ["diffusion", "network", "stack"])
def test_precisions_side_by_side(part: str, results: Path) -> None:
    rows = rows_of(part, results)
    assert list(dict.fromkeys(row["precision"] for row in rows)) == ["float32", "TF32", "bfloat16"]
    assert [row["times the first"] for row in rows] == [1.0, 2.0] * (len(rows) // 2)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("results")
def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = torch.nn.Linear(4, 3), (torch.rand(2, 4),)
    peaks = iter([None, 2_000_000_000])
    monkeypatch.setattr(ways, "peak_bytes", lambda _: next(peaks))
    cases = {"large": (network, inputs), "small": (network, inputs)}
    large, small = ways.side_by_side(cases, dtype="float32", ways=("eager",))
    assert (large["ms"], large["times the first"], large["GB"]) == ("out of memory", "", "")
    assert (small["ms"], small["times the first"], small["GB"]) == (1000.0, "", 2.0)


def test_tests_run_on_any_device(results: Path) -> None:
    (row,) = rows_of("tests", results)
    assert row["run"] == "--device meta"
    assert " passed" in row["tests"]
    assert " failed" not in row["tests"]


def test_kept_memory() -> None:
    seconds = allocator.measure(32, 1)
    assert list(seconds) == ["plain", "ours", "torch.cat"]
    assert all(value > 0 for value in seconds.values())


def test_compiled(results: Path) -> None:
    assert [row["way"] for row in rows_of("compiled", results)[::2]] == ["eager", "compiled", "graphed"]


def test_launches(results: Path) -> None:
    eager, compiled = rows_of("launches", results)
    assert eager["kernels"] > 100
    assert compiled["way"] == "compiled"


def test_detection(results: Path) -> None:
    pytest.importorskip("cv2")
    assert [row["times ours"] for row in rows_of("detection", results)] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("part", ["context", "table"])
def test_trainings_have_options_that_exist(part: str, results: Path) -> None:
    pytest.importorskip("accelerate")
    (row,) = rows_of(part, results)
    assert row["end"] == 0


def test_a_part_whose_library_is_missing_stops_no_other(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*, small: bool) -> None:  # noqa: ARG001
        raise ModuleNotFoundError("No module named 'cv2'")

    monkeypatch.setattr(gpu, "PARTS", {"first": missing, "second": lambda **_: iter([{"n": 1}])})
    gpu.main(["--small"])
    assert "first: not measured: ModuleNotFoundError: No module named 'cv2'" in capsys.readouterr().err
    assert len(list(results.glob("gpu-second-*.json"))) == 1


def test_a_training_is_stopped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SECONDS", 0.2)
    assert gpu.train(["-c", "import time; time.sleep(60)"], small=False)["end"] == "stopped, call it again"


def test_steps_are_what_they_say() -> None:
    """bfloat16 is autocast's, and a step makes gradients."""
    seen = []
    network = torch.nn.Linear(4, 3)
    network.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    for dtype in ways.PRECISIONS:
        ways.training_step(network, (torch.rand(2, 4),), dtype=dtype)()
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert network.weight.grad is not None


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["speed", "--small"])
    assert "parts must be among tests, diffusion" in capsys.readouterr().err
    if not ways.CUDA:
        with pytest.raises(SystemExit):
            gpu.main(["diffusion"])
        assert "there is no GPU here" in capsys.readouterr().err
