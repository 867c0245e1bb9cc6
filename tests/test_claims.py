"""What the README and the pages claim is what the committed tables say; the README is short; links lead somewhere."""

import json
import re
import subprocess
from functools import cache
from math import isnan
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


def test_the_page_of_the_hearts_has_what_four_times_the_steps_gave() -> None:
    rows = rows_of("sunnybrook-few-shot", "| 1600 steps |")
    of = {
        name: {r["fold"]: r for r in results("sunnybrook-longer") if r["method"] == METHODS[name]} for name in METHODS
    }
    short = [r for r in results("sunnybrook-few-shot") if (r["M"], r["seed"]) == (2, 0)]
    assert [row[0] for row in rows] == ["UNet", "UNet (c2)", "KAF-UNet", "KAF-UNet, added"]
    for row, (name, runs) in zip(rows, of.items(), strict=False):
        assert {r["settings"]["epochs"] for r in runs.values()} == {160}
        assert row[1:6] == [f"{runs[fold]['dice']:.3f}" for fold in range(5)]
        assert row[6] == f"{mean(run['dice'] for run in runs.values()):.3f}"
        assert row[7] == f"{mean(r['dice'] for r in short if r['method'] == METHODS[name]):.3f}"
        for cell, other in zip(row[8:10], ("UNet", "UNet (c2)"), strict=True):
            assert cell == (told(gain(runs, of[other])) if cell else "")
        distances = [[millimetres for _, millimetres in run["hd95"]] for run in runs.values()]
        assert row[10] == f"{mean(map(mean, distances)):.1f} mm"
        assert row[11] == f"{mean(run['losses'][-1] for run in runs.values()):.3f}"
        assert row[12] == f"{mean(run['training_seconds'] for run in runs.values()):.0f} s"
        assert f"{float(row[6]):.3f}" in README  # the README has all four
        assert f"{float(row[6]):.3f}" in (ROOT / "docs" / "when.md").read_text()


LUMBAR = {
    "UNet": "unet",
    "UNet (c2)": "unet-c2",
    "KAF-UNet": "kaf-unet",
    "KAF-UNet, added": "kaf-unet --fusion add",
    "KAF-UNet, added, rotary positions": "kaf-unet --fusion add --position rotary",
}


def rows_of(page: str, start: str) -> list[list[str]]:
    """The cells of all rows below a header of a page of results."""
    lines = (RESULTS / f"{page}.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = lines.index("", first)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]]


def lumbar_runs(levels: int, network: str, *, of: str = "lumbar") -> dict[int, dict[str, Any]]:
    """The runs of a network by fold; those in lumbar-longer took twice as many steps, in lumbar-six six subjects."""
    runs = [r for r in results(of) if (r["levels"], r["method"]) == (levels, LUMBAR[network])]
    return {run["fold"]: run for run in runs}


def subjects(run: dict[str, Any]) -> dict[str, float]:
    """The mean over the classes, and over the volumes, of each subject."""
    volumes = [(name, mean(x for x in dice if not isnan(x))) for name, *dice in run["scores"]]
    return {subject: mean(dice for name, dice in volumes if name == subject) for subject, _ in volumes}


def gain(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> tuple[float, float, int, int]:
    """By how much runs are ahead over subjects, p, and in how many of the folds that both have."""
    folds = [
        [subjects(ours[fold])[name] - subjects(theirs[fold])[name] for name in subjects(ours[fold])]
        for fold in ours.keys() & theirs.keys()
    ]
    gains = [gain for fold in folds for gain in fold]
    p = pytest.importorskip("scipy.stats").wilcoxon(gains).pvalue
    return mean(gains), p, sum(mean(fold) > 0 for fold in folds), len(folds)


def ahead(levels: int, network: str, other: str, *, of: str = "lumbar") -> tuple[float, float, int, int]:
    return gain(lumbar_runs(levels, network, of=of), lumbar_runs(levels, other, of=of))


def told(gained: tuple[float, float, int, int]) -> str:
    """A gain as the tables write it."""
    dice, p, won, folds = gained
    return f"{dice:+.3f}, p = {p:.2g}, {won} of {folds}"


def test_the_page_of_the_spines_has_what_the_runs_say() -> None:
    for levels, network, parameters, *cells in rows_of("lumbar", "| levels | network | parameters |"):
        runs = lumbar_runs(int(levels), network)
        assert [float(cell) if cell else None for cell in cells[:5]] == [
            round(runs[fold]["dice"], 3) if fold in runs else None for fold in range(5)
        ]
        assert float(cells[5]) == pytest.approx(mean(run["dice"] for run in runs.values()), abs=6e-4)
        for cell, other in zip(cells[6:8], ("UNet", "UNet (c2)"), strict=True):
            if cell:
                assert cell == told(ahead(int(levels), network, other))
        rows = [row for run in runs.values() for row in run["scores"]]
        of_vertebrae = [mean(row[i] for row in rows if not isnan(row[i])) for i in range(1, 6)]
        assert cells[8] == " ".join(f"{dice:.2f}" for dice in of_vertebrae)
        assert cells[9] == f"{mean(run['training_seconds'] for run in runs.values()):.0f} s"
        assert parameters == f"{runs[0]['parameters'] / 1e6:.2f} M"
    for levels, network, folds, *losses in rows_of("lumbar", "| levels | network | folds |"):
        runs = lumbar_runs(int(levels), network)
        assert int(folds) == len(runs)
        at = [mean(run["losses"][10 * i + 9] for run in runs.values()) for i in range(6)]
        assert [float(loss) for loss in losses] == pytest.approx(at, abs=6e-3)


def test_the_page_of_the_spines_has_what_more_steps_gave() -> None:
    rows = rows_of("lumbar", "| 1200 steps | network |")
    assert len(rows) == len({(r["levels"], r["method"]) for r in results("lumbar-longer")})
    for levels, network, *cells in rows:
        runs, before = (lumbar_runs(int(levels[0]), network, of=name) for name in ("lumbar-longer", "lumbar"))
        assert {run["settings"]["epochs"] for run in runs.values()} == {120}
        assert cells[:5] == [f"{runs[fold]['dice']:.3f}" if fold in runs else "" for fold in range(5)]
        assert cells[5] == f"{mean(run['dice'] for run in runs.values()):.3f}"
        assert cells[6] == f"{mean(before[fold]['dice'] for fold in runs):.3f}"
        for cell, other in zip(cells[7:9], ("UNet", "UNet (c2)"), strict=True):
            if cell:
                assert cell == told(ahead(int(levels[0]), network, other, of="lumbar-longer"))
        assert cells[9] == f"{mean(run['losses'][-1] for run in runs.values()):.2f}"
        assert cells[10] == f"{mean(run['training_seconds'] for run in runs.values()):.0f} s"
    for levels, network, folds, *losses in rows_of("lumbar", "| 1200 steps, losses |"):
        runs = lumbar_runs(int(levels[0]), network, of="lumbar-longer")
        assert int(folds) == len(runs)
        at = [mean(run["losses"][20 * i + 19] for run in runs.values()) for i in range(6)]
        assert [float(loss) for loss in losses] == pytest.approx(at, abs=6e-3)


def test_the_page_of_the_spines_has_what_more_subjects_gave() -> None:
    rows = rows_of("lumbar", "| M = 6 | network |")
    assert len(rows) == len({(r["levels"], r["method"]) for r in results("lumbar-six")})
    for levels, network, *cells in rows:
        runs = lumbar_runs(int(levels[0]), network, of="lumbar-six")
        assert cells[:5] == [f"{runs[fold]['dice']:.3f}" if fold in runs else "" for fold in range(5)]
        assert cells[5] == f"{mean(run['dice'] for run in runs.values()):.3f}"
        if cells[6]:
            assert cells[6] == told(ahead(int(levels[0]), network, "UNet", of="lumbar-six"))
        assert cells[7] == f"{mean(run['losses'][-1] for run in runs.values()):.2f}"


def test_what_the_pages_say_of_the_spines() -> None:
    when = (ROOT / "docs" / "when.md").read_text()
    for levels in (4, 5):
        line = next(line for line in when.splitlines() if re.match(rf"\| {levels} \| 0\.(30|62) ", line))
        for name in ("UNet", "UNet (c2)", "KAF-UNet"):
            runs = lumbar_runs(levels, name, of="lumbar-longer")
            runs = {
                fold: runs[fold] for fold in runs.keys() & lumbar_runs(levels, "KAF-UNet", of="lumbar-longer").keys()
            }
            dice = mean(run["dice"] for run in runs.values()) if runs else None
            led = f" ({ahead(levels, name, 'UNet', of='lumbar-longer')[0]:+.3f})" if runs and name != "UNet" else ""
            assert f"| {dice:.3f}{led} |" in line if runs else "| not run |" in line
    dice, p, won, folds = ahead(4, "KAF-UNet", "UNet", of="lumbar-longer")
    assert (won, folds, p < 0.001) == (5, 5, True)
    assert f"gained {dice:.3f} with four levels" in README
    short = [ahead(levels, "KAF-UNet", "UNet")[0] for levels in (4, 5)]
    assert "In runs of 600 steps the leads were {:.3f} and {:.3f}".format(*short) in README
    added = [ahead(levels, "KAF-UNet, added", "UNet") for levels in (4, 5)]
    assert (
        f"They gained {added[0][0]:.3f} there with four levels, and with five {added[1][0]:.3f}, within chance" in when
    )
    assert added[1][1] > 0.05
    dice, p, *_ = gain(*(lumbar_runs(levels, n, of="lumbar-longer") for levels, n in ((5, "UNet"), (4, "KAF-UNet"))))
    assert f"ahead of a KAF-UNet of four by {dice:.3f}" in when
    assert ahead(5, "KAF-UNet", "UNet", of="lumbar-six")[0] == pytest.approx(0.154, abs=5e-4)


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
