"""The benchmarks of volumes: closed forms, motions whose result is known, and the baseline against the package."""

import json

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import numpy as np

from benchmarks.common import harness
from benchmarks.common.networks import VOLUMETRIC
from benchmarks.cost import flops, memory, sweep
from benchmarks.detection import volumes
from benchmarks.detection.volumetric import Points, Volume, laplacian, laplacian_turned, sift
from benchmarks.speed import passes, volume_stack
from benchmarks.speed.plain import PlainDiffusion
from kaf_layer import KeypointDiffusion


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def rows_of(results, name: str) -> dict[str, dict]:
    rows = json.loads((results / f"{name}.json").read_text())["rows"]
    return {row["network"]: row for row in rows if row["of"] in ("forward", "saved for backward")}


def test_dense_diffusion_by_its_formula(results, monkeypatch):
    edge, hidden = 32, 64
    compared = {
        name: build
        for name, build in VOLUMETRIC.items()
        if "Swin" not in name and "UNet" not in name and name != "KAF layers"
    }
    assert {"SwinUNETR", "KAF-UNet's encoder"} < VOLUMETRIC.keys() - compared.keys()
    monkeypatch.setattr(sweep, "VOLUMETRIC", compared)
    options = ["--spatial-dims", "3", "--edges", str(edge), "--attentions", "4"]
    flops.main(options)
    memory.main(options)
    counted, saved = rows_of(results, "flops-3d"), rows_of(results, "memory-3d")
    voxels = [(edge // 2**i) ** 3 for i in range(4)]
    by_scale = [2 * 27 * n * hidden * (256 + 32 * 2**i) / 1e9 for i, n in enumerate(voxels)]
    assert counted["diffusion alone, dense"]["32"] == pytest.approx(by_scale[0], rel=1e-9)
    ratio = counted["diffusion alone, dense"]["32"] / counted["diffusion alone"]["32"]
    assert 3 < ratio < 30  # an eighth of what it is at 64, where nearly as many voxels are active
    layers = [counted[name]["32"] for name in ("KAF layers, dense", "KAF layers, the paper's block")]
    assert 0.5 * sum(by_scale) < layers[0] - layers[1] < sum(by_scale)
    # The map of tokens, the first convolution's result, and that after batch normalisation and ReLU.
    dense = [4 * n * (256 + 2 * hidden) / 1e6 for n in voxels]
    assert saved["diffusion alone, dense"]["32"] == pytest.approx(dense[0], rel=0.01)
    layers = [saved[name]["32"] for name in ("KAF layers, dense", "KAF layers, the paper's block")]
    assert 0 < layers[0] - layers[1] < sum(dense)


def test_the_baseline_computes_the_same():
    plain, ours = (cls(256, 4, spatial_dims=3).double() for cls in (PlainDiffusion, KeypointDiffusion))
    ours.load_state_dict(plain.state_dict())
    keypoints, tokens = passes.random_keypoints(2, 9, 6, 3), torch.randn(2, 9, 256, dtype=torch.float64)
    assert keypoints.cells((6, 6, 6)).sort().values.diff().gt(0).all()
    torch.testing.assert_close(ours(tokens, keypoints, (6,) * 3), plain(tokens, keypoints, (6,) * 3), rtol=0, atol=1e-9)


def test_the_time_of_a_stack(monkeypatch):
    """Every network runs; what is longer is not trained; ratios are to the first."""
    gradients = []

    def compare(runs, repeats):
        for run in runs.values():
            run()
        networks = [run.args[0] for run in runs.values()]
        gradients.append([any(p.grad is not None for p in network.parameters()) for network in networks])
        return dict(zip(runs, (2.0, 3.0, 4.0, 5.0 * repeats), strict=True))

    monkeypatch.setattr(volume_stack, "compare", compare)
    monkeypatch.setattr(volume_stack, "TRAINED", 32)
    rows = list(volume_stack.volume_stack(32, attentions=4, repeats=2, device="cpu"))
    assert [row["times the KAF layers"] for row in rows] == [1.0, 1.5, 2.0, 5.0] * 2
    assert gradients == [[False] * 4, [True] * 4]
    monkeypatch.setattr(volume_stack, "compare", lambda runs, **_: dict.fromkeys(runs, 1.0))
    assert {row["of"] for row in volume_stack.volume_stack(64, attentions=4, repeats=1, device="cpu")} == {"forward"}


def blobs() -> Volume:
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (24, 28, 32)), indexing="ij")
    centres, signs = [(7, 8, 9), (15, 18, 10), (9, 19, 22), (16, 9, 21)], (1, -1, 1, -1)
    values = sum(
        s * np.exp(-((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2) / 2 / 2.5**2)
        for s, (a, b, c) in zip(signs, centres, strict=True)
    )
    return Volume(values.astype(np.float32), (1.0, 1.0, 1.0))


def test_a_motion_carries_keypoints_with_the_voxels():
    volume = blobs()
    other, motion = volumes.disturbed(volume, np.array([1.0, 0.0, 0.0]), 20, 1.1, 0.0, np.random.default_rng(0))
    for detect in (sift, lambda v: laplacian(v, sigma=2.0), lambda v: laplacian_turned(v, sigma=2.0)):
        a, b = detect(volume), detect(other)
        error = volumes.distances(motion(a.positions[:4]), b.positions).min(1)
        assert (error < 1.5).all()
        assert np.allclose(np.linalg.norm(a.descriptors, axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(motion.inverse()(motion(a.positions)), a.positions, atol=1e-9)


def test_scores_by_hand():
    still = volumes.Motion(np.eye(3), np.array([5.0, 5, 5]))
    a = np.array([[1.0, 1, 1], [8, 8, 8], [1.2, 1, 1]])  # the third is no position of its own
    b = np.array([[1.0, 2.5, 1], [4, 4, 4]])
    assert volumes.repeatability(a, b, still, (11, 11, 11)) == pytest.approx((1 + 1) / 4)
    one, two = np.eye(3), np.eye(3)[[0, 1]]
    assert volumes.matches(Points(a, one), Points(b, two), still) == (0.5, 1)
