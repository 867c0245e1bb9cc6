"""Draws what flops.py and memory.py counted against the image's edge, in the manner of the paper's Figure 5.

python benchmarks/figure.py [--publish]
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {
    "KAF layers": ("#c2185b", "-"),
    "KAF layers, dense": ("#e8963c", "-"),
    "KAF-UNet's encoder": ("#c2185b", ":"),
    "Swin-T": ("#1f6fb4", "-"),
    "SwinUNETR": ("#2b9a8b", "-"),
    "SwinUNETR, embedding 24": ("#2b9a8b", ":"),
    "global attention": ("#6b6b6b", "-"),
}
PANELS = {
    "flops": ("forward", "GFLOPs, forward pass"),
    "memory": ("saved for backward", "MB saved for the backward pass"),
}


def draw() -> None:
    """A column for each number of self-attentions, a row for each quantity whose results are there."""
    tables = {name: rows for name in PANELS if (rows := measured(harness.RESULTS / f"{name}.json"))}
    if not tables:
        print(f"Nothing to draw in {harness.RESULTS}: run flops.py or memory.py first.")
        return
    counts = sorted({row["attentions"] for rows in tables.values() for row in rows})
    with mpl.rc_context({"font.size": 9.5}):
        figure = Figure(figsize=(5 * len(counts), 3.6 * len(tables)), layout="constrained", facecolor="white")
        grid = figure.subplots(len(tables), len(counts), sharey="row", squeeze=False)
        for axes_row, (name, rows) in zip(grid, tables.items(), strict=True):
            quantity, label = PANELS[name]
            lines = [[row for row in rows if (row["attentions"], row["of"]) == (count, quantity)] for count in counts]
            for axes, count, networks in zip(axes_row, counts, lines, strict=True):
                plot(axes, networks)
                axes.set_title(f"{count} self-attentions", loc="left", fontsize=10.5)
            for axes, networks in zip(axes_row, lines, strict=True):  # now that the height they share is known
                name_lines(axes, networks)
            axes_row[0].set_ylabel(label)
        for axes in grid[-1]:
            axes.set_xlabel("image edge, pixels")
        figure.savefig(harness.RESULTS / "attention.png", dpi=120)


def measured(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, without those of networks that could not be measured."""
    return [row for row in json.loads(path.read_text())["rows"] if row["of"] != "-"] if path.is_file() else []


def points(row: dict[str, Any]) -> dict[int, float]:
    return {int(key): value for key, value in row.items() if key.isdigit()}


def plot(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["network"] in STYLES:
            colour, style = STYLES[row["network"]]
            axes.plot(*zip(*points(row).items(), strict=True), style, color=colour, lw=2, marker="o", ms=3.5)
    edges = list(points(rows[0]))
    axes.set(xscale="log", yscale="log", xlim=(edges[0] * 0.93, edges[-1] * 1.05))
    axes.set_xticks(edges, [str(edge) for edge in edges])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_lines(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Writes the names at the right ends."""
    edge = max(points(rows[0]))
    ends = {row["network"]: row[str(edge)] for row in rows if row["network"] in STYLES}
    low, high = axes.get_ylim()
    for name, height in spread(ends, gap=(high / low) ** 0.055).items():
        axes.text(edge * 1.09, height, name, color=STYLES[name][0], va="center")


def spread(heights: dict[str, float], *, gap: float) -> dict[str, float]:
    """Heights moved until each is at least about a factor of ``gap`` above the next lower one."""
    order = sorted(heights, key=heights.__getitem__)
    placed = dict(heights)
    for _ in range(100):
        for below, above in pairwise(order):
            push = max(1.0, gap * placed[below] / placed[above]) ** 0.5
            placed[below] /= push
            placed[above] *= push
    return placed


if __name__ == "__main__":
    harness.parser(__doc__).parse_args()
    draw()
