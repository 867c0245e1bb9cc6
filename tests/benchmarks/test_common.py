"""What all benchmarks share: counts against closed forms, alternating runs, tables that are saved row by row."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmarks
from benchmarks.common import harness
from benchmarks.common.harness import markdown, report
from benchmarks.common.measuring import compare, count_flops, saved_bytes


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def rows_of(results: Path, name: str) -> list[dict]:
    return json.loads((results / f"{name}.json").read_text())["rows"]


@pytest.mark.parametrize("fake", [False, True])
class TestCounts:
    @pytest.fixture(autouse=True)
    def mode(self, fake):
        with FakeTensorMode() if fake else nullcontext():
            yield

    @pytest.mark.parametrize("masked", [False, True])
    def test_attention(self, masked):
        q, k, v = torch.rand(2, 4, 10, 8, requires_grad=True), torch.rand(2, 4, 30, 8), torch.rand(2, 4, 30, 8)
        mask = torch.ones(2, 1, 1, 30, dtype=torch.bool) if masked else None
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) == 2 * 2 * 2 * 10 * 30 * 32

    def test_attention_backward(self):
        q, k, v = (torch.rand(2, 4, 10, 8, requires_grad=True) for _ in range(3))
        # The gradients of two products are four.
        expected = 3 * 2 * 2 * 2 * 10 * 10 * 32
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == expected

    def test_convolution(self):
        convolution, image = nn.Conv2d(3, 5, 3, padding=1), torch.rand(2, 3, 8, 12)
        forward = 2 * 9 * 3 * 5 * 2 * 8 * 12
        assert count_flops(lambda: convolution(image)) == forward
        # The image needs no gradient, the weight does.
        assert count_flops(lambda: convolution(image).sum().backward()) == 2 * forward

    def test_saved(self):
        linear, x = nn.Linear(8, 16), torch.rand(3, 5, 8)
        assert saved_bytes(lambda: linear(x)) == 4 * 3 * 5 * 8  # the input, not the weight, of which a view is saved
        assert saved_bytes(lambda: linear(x), aside=[x]) == 0
        # The result of the ReLU is saved twice, by it and by the second layer.
        second = nn.Linear(16, 4)
        assert saved_bytes(lambda: second(F.relu(linear(x))), aside=[x]) == 4 * 3 * 5 * 16

    def test_saved_scores(self):
        """Attention written out saves its weights; the fused kernel does not."""
        q = torch.rand(1, 2, 64, 8, requires_grad=True)
        plain = saved_bytes(lambda: torch.softmax(q @ q.mT, dim=-1) @ q, aside=[q])
        assert plain == 4 * 2 * 64 * 64
        fused = saved_bytes(lambda: F.scaled_dot_product_attention(q, q, q), aside=[q])
        assert fused == 4 * (2 * 64 * 8 + 2 * 64)  # the result, and a sum for each query


def test_compare_alternates():
    calls: list[str] = []
    medians = compare({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert set(medians) == {"a", "b"}
    assert all(seconds >= 0 for seconds in medians.values())


def test_report(results):
    rows = [{"network": "a", "GFLOPs": 0.12345, "n": 7}, {"network": "b", "GFLOPs": 1234.5, "n": 8}]
    assert markdown(rows).splitlines() == [
        "| network | GFLOPs | n |",
        "| --- | --- | --- |",
        "| a | 0.123 | 7 |",
        "| b | 1234 | 8 |",
    ]
    text = report("name", rows, notes="Notes.", measured=False)
    assert "Notes." in text
    assert (results / "name.md").read_text() == text
    assert rows_of(results, "name") == rows


def test_rows_are_saved_as_they_come(results):
    seen = []

    def rows():
        for i in range(3):
            yield {"n": i}
            seen.append(len(rows_of(results, "name")))

    report("name", rows(), notes="Notes.", measured=False)
    assert seen == [1, 2, 3]
    assert report("none", [], notes="Notes.", measured=False) == ""
    assert not (results / "none.md").exists()


def test_nothing_is_published_unless_asked_for(results):
    parser = harness.parser("")
    parser.parse_args([])
    assert results == harness.RESULTS
    parser.parse_args(["--publish"])
    assert Path(benchmarks.__file__).parent / "results" == harness.RESULTS
