"""What the README and the pages claim is what the committed tables say; the README is short; links lead somewhere."""

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {
    "UNet": "unet",
    "UNet (c2)": "unet-c2",
    "KAF-UNet: KAF layers, concatenated": "kaf-unet",
    "KAF-UNet: KAF layers, added": "kaf-unet --fusion add",
    "SwinUNETR": "swin-unetr",
}
NETWORKS = {
    "KAF layers alone": "KAF layers",
    "KAF layers alone, diffusion": "KAF layers, dense",
    "KAF-UNet encoder": "KAF-UNet's encoder",
    "Swin-T": "Swin-T",
    "SwinUNETR encoder, 48": "SwinUNETR",
    "SwinUNETR encoder, 24": "SwinUNETR, embedding 24",
}


@cache
def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(start: str) -> dict[str, list[str]]:
    """The cells of the README's table whose header begins so, by the first cell of each row."""
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {start}"))
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 110
    text = re.sub(r"^```.*?^```|^\|.*?$|^#.*?$|!\[.*?\]\(.*?\)", "", README, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    sentences = [s for part in re.split(r"\n\s*\n|\n- ", text) for s in re.split(r"(?<=[.?!])\s+", part)]
    assert [s for s in sentences if len(s.split()) > 25] == []


@pytest.mark.parametrize("row", METHODS)
def test_readme_has_the_dice_of_the_runs(row: str) -> None:
    cells = next(cells for name, cells in table("network | parameters").items() if name == row or row in name)
    own = [r for r in results("sunnybrook-few-shot") if r["method"] == METHODS[row]]
    assert float(cells[0].removesuffix(" M")) == pytest.approx(own[0]["parameters"] / 1e6, abs=0.005)
    for labelled, cell in zip((1, 2, 6), cells[1:4], strict=True):
        assert float(cell) == pytest.approx(mean(r["dice"] for r in own if r["M"] == labelled), abs=5e-4)


@pytest.mark.parametrize("row", NETWORKS)
def test_readme_has_the_counted_flops(row: str) -> None:
    cells = next(cells for name, cells in table("GFLOPs by").items() if name.startswith(row))
    (counted,) = [
        r
        for r in results("flops")["rows"]
        if (r["network"], r["attentions"], r["of"]) == (NETWORKS[row], 20, "forward")
    ]
    assert [float(cell) for cell in cells] == [round(counted[edge]) for edge in ("128", "256", "512", "1024")]


def test_the_kaf_unet_is_ahead_where_the_readme_says() -> None:
    comparison = pytest.importorskip("examples.protocol.results.comparison", reason="the extra train is not here")
    runs = results("sunnybrook-few-shot")
    of = {m: {k: [r for r in runs if (r["method"], r["M"]) == (m, k)] for k in (1, 2, 6)} for m in METHODS.values()}
    for other in ("unet", "unet-c2"):
        for labelled in (1, 2, 6):
            difference = comparison.difference(of["kaf-unet"][labelled], of[other][labelled])
            assert (difference.p < 0.001, difference.ahead, difference.folds) == (True, 5, 5)
    p = [comparison.difference(of["kaf-unet"][k], of["swin-unetr"][k]).p for k in (1, 2, 6)]
    assert p[1] == pytest.approx(0.015, abs=5e-4)
    assert min(p[0], p[2]) > 0.1
    longer = [r for r in results("sunnybrook-methods") if r["method"] == "kaf-unet+kaf, 1600 steps"]
    for labelled, gain in ((1, 0.070), (2, 0.006), (6, -0.005)):
        plain = [
            r
            for r in results("sunnybrook-methods")
            if (r["method"], r["M"]) == ("kaf-unet", labelled) and r["seed"] < 2
        ]
        assert comparison.difference([r for r in longer if r["M"] == labelled], plain).dice == pytest.approx(
            gain, abs=5e-4
        )


@pytest.mark.parametrize(
    ("name", "with_layers", "without"),
    [("cpu", 0.591, 0.440), ("seeds-cpu", 0.586, 0.431), ("lumbar-cpu", 0.576, 0.404)],
)
def test_layers_attached_to_a_trained_network_are_ahead(name: str, with_layers: float, without: float) -> None:
    rows = {row["network"]: row for row in results(f"attached-{name}")["rows"]}
    for network, dice in (("fine-tuned with layers attached", with_layers), ("fine-tuned", without)):
        assert rows[network]["Dice"].startswith(f"{dice:.3f} ")
        assert f"{dice:.3f}" in README
    assert rows["fine-tuned"]["in folds"] == "5 of 5"


def slug(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", "").replace("*", "")).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    texts = {
        path: re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for path in map(ROOT.joinpath, listed.stdout.split())
    }
    headings = {path: {slug(h) for h in re.findall(r"^#+ (.*)$", t, flags=re.MULTILINE)} for path, t in texts.items()}
    wrong = []
    for path, text in texts.items():
        for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists() or (anchor and target in headings and anchor not in headings[target]):
                wrong.append((str(path.relative_to(ROOT)), link))
    assert wrong == []
