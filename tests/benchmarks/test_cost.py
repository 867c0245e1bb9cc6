"""flops.py, memory.py and launches.py against closed forms."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("monai")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.common import harness
from benchmarks.common.networks import NETWORKS
from benchmarks.cost import flops, launches, memory, sweep
from benchmarks.speed import layers

EMBED, POINTS, SCALES = 256, 500, 4


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def rows_of(results: Path, name: str) -> list[dict]:
    return json.loads((results / f"{name}.json").read_text())["rows"]


def attention_blocks(tokens: int, channels: int, window: int) -> int:
    """One Transformer block: four projections, an MLP of four times the width, and two products of attention."""
    return 24 * tokens * channels**2 + 4 * tokens * window * channels


def swin(edge: int, *, patch: int, embed: int, depths: tuple[int, ...]) -> int:
    """Its edge fills windows of 7 pixels in every stage; MONAI merges pixels after the last stage too."""
    side = edge // patch
    total = 2 * patch**2 * embed * side**2
    for depth in depths:
        total += depth * attention_blocks(side**2, embed, 49)
        side, embed = (side + 1) // 2, 2 * embed
        total += 2 * side**2 * (2 * embed) * embed
    return total


def position_encoder(points: int) -> int:
    return 2 * points * (2 * 32 + 32 * 64 + 64 * 128 + 128 * 256 + 256 * EMBED)


def kaf_attention(depth: int, block: str) -> int:
    """Four scales: projections to tokens, positions, blocks."""
    embedding = sum(2 * POINTS * 32 * 2**i * EMBED for i in range(SCALES))
    linear = {"transformer": 24, "propagation": 20}[block] * POINTS * EMBED**2
    return embedding + SCALES * (position_encoder(POINTS) + depth * (linear + 4 * POINTS**2 * EMBED))


def dense_diffusion(edge: int) -> int:
    return sum(2 * 9 * (edge // 2**i) ** 2 * 64 * (EMBED + 32 * 2**i) for i in range(SCALES))


class TestFlops:
    edge, attentions = 224, 8

    @pytest.fixture
    def counted(self, results):
        flops.main(["--edges", str(self.edge), "--attentions", str(self.attentions)])
        assert (results / "flops.md").read_text().count("\n| ") > 2
        assert (results / "attention.png").stat().st_size > 0
        return {(row["network"], row["of"]): row[str(self.edge)] * 1e9 for row in rows_of(results, "flops")}

    def test_table(self, counted):
        forward = {name: value for (name, of), value in counted.items() if of == "forward"}
        both = {name: value for (name, of), value in counted.items() if of == "forward+backward"}

        expected = {
            "KAF layers, dense": kaf_attention(2, "propagation") + dense_diffusion(self.edge),
            "Swin-T": swin(self.edge, patch=4, embed=96, depths=(2, 2, 2, 2)),
            "SwinUNETR": swin(self.edge, patch=2, embed=48, depths=(2, 2, 2, 2)),
            "SwinUNETR, embedding 24": swin(self.edge, patch=2, embed=24, depths=(2, 2, 2, 2)),
            "global attention": 8 * attention_blocks(14**2, EMBED, 14**2) + 2 * 2 * 14**2 * 512 * EMBED,
        }
        assert {name: forward[name] for name in expected} == pytest.approx(expected, rel=1e-12)

        # The backward pass costs twice the forward pass, but inputs without gradient cost no more than their weight.
        positions = SCALES * 2 * POINTS * 2 * 32
        assert both["KAF layers, dense"] == pytest.approx(3 * expected["KAF layers, dense"] - positions, rel=1e-12)
        patches = 2 * self.edge**2 * 96
        assert both["Swin-T"] == pytest.approx(3 * expected["Swin-T"] - patches, rel=1e-12)
        assert both["global attention"] == pytest.approx(3 * expected["global attention"], rel=1e-12)

        for name, block in (("KAF layers", "transformer"), ("KAF layers, the paper's block", "propagation")):
            diffusion = forward[name] - kaf_attention(2, block)
            assert 0 < diffusion < dense_diffusion(self.edge) / 2


def test_memory(results):
    memory.main(["--edges", "512", "--attentions", "8"])
    saved = {row["network"]: row["512"] * 1e6 for row in rows_of(results, "memory")}
    # The map of tokens, the first convolution's result, and that after batch normalisation and ReLU.
    dense = sum(4 * (512 // 2**i) ** 2 * (EMBED + 64 + 64) for i in range(SCALES))
    difference = saved["KAF layers, dense"] - saved["KAF layers, the paper's block"]
    assert 0.95 * dense < difference < dense


@pytest.mark.parametrize("name", ["KAF layers", "SwinUNETR, embedding 24", "global attention"])
def test_fake_tensors_count_as_real_ones(name):
    def counts() -> tuple[dict[str, float], dict[str, float]]:
        network = NETWORKS[name](8)
        inputs = network.inputs(32)
        return flops.measure(network, inputs), memory.measure(network, inputs)

    real = counts()
    with FakeTensorMode():
        assert counts() == real


def test_flops_of_a_stack_of_layers():
    row = layers.stack_flops(32)
    attention = SCALES * (position_encoder(512) + 6 * attention_blocks(512, EMBED, 512)) / 1e9
    assert row["attention"] == pytest.approx(attention, rel=1e-12)
    assert row["ratio"] == pytest.approx(row["all"] / attention, rel=1e-12)


def test_peers_that_are_missing_or_broken_are_told_and_stop_no_other(results, monkeypatch, capsys):
    def missing(_):
        import no_such_library

        return no_such_library.Network()

    class Broken(torch.nn.Module):
        def inputs(self, edge: int):  # noqa: ARG002
            raise RuntimeError("operator x::nms\ndoes not exist")

    peers = {"missing": missing, "broken": lambda _: Broken(), "global attention": NETWORKS["global attention"]}
    monkeypatch.setattr(sweep, "NETWORKS", peers)
    flops.main(["--edges", "32", "--attentions", "8"])
    first, second, *others = rows_of(results, "flops")
    assert first["configuration"] == "not measured: ModuleNotFoundError: No module named 'no_such_library'"
    assert second["configuration"] == "not measured: RuntimeError: operator x::nms does not exist"
    assert first["32"] == second["of"] == "-"
    assert [row["of"] for row in others] == ["forward", "forward+backward"]
    assert all(row["32"] > 0 for row in others)
    assert "broken: not measured" in capsys.readouterr().err
    assert (results / "attention.png").stat().st_size > 0


@pytest.mark.parametrize("arguments", [["--edges", "100"], ["--attentions", "6"], ["--edges", "-16"]])
def test_sizes_that_do_not_fit(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        flops.main(arguments)
    assert "must be a multiple of" in capsys.readouterr().err


@pytest.mark.parametrize(("edge", "forward", "backward"), [(512, 220, 220), (64, 180, 160)])
def test_launches_with_absolute_positions(edge: int, forward: int, backward: int) -> None:
    """Without rotations a layer keeps to what it had been brought to."""
    counted = launches.layer_launches(edge, position="absolute")
    assert counted["forward"].total() <= forward
    assert counted["backward"].total() <= backward


def test_launches(results):
    """What is counted, on a chain of known operations; and that a layer keeps to what it has been brought to."""
    x = torch.rand(3, 4, requires_grad=True)
    names = launches.count(lambda: (x.exp().view(12) + 1).sum().backward())
    assert names == {"exp": 1, "add": 1, "sum": 1, "ones_like": 1, "mul": 1}
    launches.main([])
    large, small = rows_of(results, "launches")[:2]
    # Rotations of queries and keys take 54 and 124 of them.
    assert large["forward"] <= 270
    assert large["backward"] <= 345
    assert small["forward"] <= 230
    assert small["backward"] <= 290


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own use of TorchScript
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("position", "most"), [("absolute", 9), ("both", 10)])
def test_compiled_launches(position, most):
    """A block has four linear maps: a product each forward, two backward. All else is fused into fewer calls."""
    none, one = (launches.compiled_calls(64, depth=depth, position=position) for depth in (0, 1))
    assert one["forward, compiled"] - none["forward, compiled"] in range(5, most + 1)
    assert one["backward, compiled"] - none["backward, compiled"] in range(9, 20)
