"""benchmarks/speed/layers.py at its smallest: the baseline computes what the package does, and the tables add up."""

import json

import pytest
import torch

from benchmarks.common import harness
from benchmarks.speed import fusion, network_step, passes
from benchmarks.speed import layers as speed
from benchmarks.speed.plain import PlainDiffusion
from kaf_layer import KeypointDiffusion


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def rows_of(results, name: str) -> list[dict]:
    (path,) = results.glob(f"{name}*.json")
    return json.loads(path.read_text())["rows"]


def test_the_baseline_computes_the_same():
    plain, ours = PlainDiffusion(256, 4).double(), KeypointDiffusion(256, 4).double()
    ours.load_state_dict(plain.state_dict())
    keypoints, tokens = passes.random_keypoints(2, 9, 16), torch.randn(2, 9, 256, dtype=torch.float64)
    assert keypoints.cells((16, 16)).sort().values.diff().gt(0).all()
    torch.testing.assert_close(
        ours(tokens, keypoints, (16, 16)), plain(tokens, keypoints, (16, 16)), rtol=1e-10, atol=1e-10
    )


def test_the_diffusion_table(monkeypatch):
    monkeypatch.setattr(passes, "compare", lambda runs, repeats: dict(zip(runs, (3.0 * repeats, 2.0), strict=True)))
    row = speed.diffusion(torch.float32, 512, 1, 64, repeats=1)
    assert row["map"] == "64x64, 256"
    assert row["forward"] == row["forward+backward"] == 1.5
    dense = 2 * 64**2 * 9 * 64 * (256 + 256)
    hybrid = 2 * 9 * 64 * (513 * 256 + 64**2 * 256)
    assert row["FLOPs"] == pytest.approx(dense / hybrid, rel=0.01)
    # A map of 256 channels and two of 64, against tokens, weights in another order, and two maps of 64.
    assert row["saved"] == pytest.approx(64**2 * (256 + 2 * 64) / (512 * 256 + 9 * 256 * 64 + 64**2 * 2 * 64), rel=0.03)
    assert row["missed"] == "-"
    monkeypatch.setitem(speed.TARGETS, 64, (1.6, 1.0, 9.0, 1.0))
    assert speed.diffusion(torch.float32, 512, 1, 64, repeats=1)["missed"] == "forward, saved"


def test_a_dense_network_without_a_fast_backward_pass(monkeypatch):
    monkeypatch.setattr(passes, "compare", lambda runs, repeats: dict(zip(runs, (3.0 * repeats, 2.0), strict=True)))
    rows = []
    for limit in (2**31, 4 * 256 * 12**3):
        monkeypatch.setattr(speed, "SLOW_BYTES", limit)
        rows.append(speed.diffusion(torch.float32, 4, 1, 12, repeats=1, spatial_dims=3))
    assert [row["forward+backward"] for row in rows] == [1.5, "too slow"]
    assert list(rows[0]) == list(rows[1])  # in one table
    assert rows[0]["saved"] == rows[1]["saved"] > 1


def test_the_other_tables(results, monkeypatch):
    for module in (passes, network_step):
        monkeypatch.setattr(
            module, "compare", lambda runs, repeats: {name: (run(), 1.0 * repeats)[1] for name, run in runs.items()}
        )
    monkeypatch.setattr(speed, "WIDTH", 8)
    speed.main(["--parts", "stack", "network", "--edges", "64", "--depth", "2", "--repeats", "1"])
    ours, recomputing = rows_of(results, "stack")
    assert recomputing["saved"] > ours["saved"] > 1
    assert ours["FLOPs"] > 1
    small, large = rows_of(results, "network")
    assert small["FLOPs"] > large["FLOPs"] > 1


def test_attention_dominates():
    row = speed.stack_flops(512)
    assert row["ratio"] < 1.15
    assert speed.stack_flops(1024)["all"] < 1.02 * row["all"]


def test_the_fusion_table(results, monkeypatch):
    outputs = []

    def once(runs, **_):
        outputs.append([run() for run in runs.values()])
        return dict(zip(runs, (3.0, 2.0), strict=True))

    monkeypatch.setattr(passes, "compare", once)
    fusion.main(["--edges", "128", "--batch", "2"])  # where both convolutions are sparse
    rows = rows_of(results, "fusion")
    assert [(row["fusion"], row["layout"]) for row in rows] == [
        (name, layout) for name in ("concat", "add") for layout in ("contiguous", "channels last")
    ]
    for afterwards, at_once in outputs[::2]:  # the others are whole steps, which return nothing
        torch.testing.assert_close(at_once, afterwards, rtol=1e-4, atol=1e-4)
        assert at_once.stride() == afterwards.stride()
    assert {row["forward, ratio"] for row in rows} == {1.5}
    added = rows[2]["afterwards, saved MiB"] - rows[2]["at once, saved MiB"]
    assert added == pytest.approx(2 * 128 * 128**2 * 4 / 2**20, rel=0.1)  # the map, in single precision
