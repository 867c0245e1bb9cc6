"""Draws FLOPs and saved memory by the image's edge, like the paper's Figure 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import harness

# Solid lines are parts of a network. Dashed lines are whole encoders.
STYLES = {
    "KAF layers": ("#c2185b", "-", "KAF layers"),
    "KAF layers, dense": ("#e8963c", "-", "KAF layers, dense diffusion (the paper's)"),
    "KAF-UNet's encoder": ("#c2185b", "--", "KAF-UNet's encoder: layers and convolutions"),
    "Swin-T": ("#1f6fb4", "--", "Swin-T"),
    "SwinUNETR": ("#2b9a8b", "--", "SwinUNETR's encoder, width 48"),
    "SwinUNETR, embedding 24": ("#8bc9c0", "--", "SwinUNETR's encoder, width 24"),
    "global attention": ("#6b6b6b", "-", "global attention at stride 16"),
}
PANELS = {
    "flops": ("forward", "GFLOPs, forward"),
    "memory": ("saved for backward", "MB saved for backward"),
}


def draw() -> None:
    """Draws a column for each number of self-attentions and a row for each quantity that has results."""
    tables = {name: rows for name in PANELS if (rows := measured(harness.RESULTS / f"{name}.json"))}
    if not tables:
        print(f"There is nothing to draw in {harness.RESULTS}. Run benchmarks/flops.py or benchmarks/memory.py first.")
        return
    counts = sorted({row["attentions"] for rows in tables.values() for row in rows})
    with mpl.rc_context({"font.size": 10}):
        size = (0.6 + 3.1 * len(counts), 1.4 + 2.6 * len(tables))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        grid = figure.subplots(len(tables), len(counts), sharey="row", squeeze=False)
        for axes_row, (name, rows) in zip(grid, tables.items(), strict=True):
            quantity, label = PANELS[name]
            for axes, count in zip(axes_row, counts, strict=True):
                plot(axes, [row for row in rows if (row["attentions"], row["of"]) == (count, quantity)])
                axes.set_title(f"{count} self-attentions", loc="left", fontsize=10)
            axes_row[0].set_ylabel(label)
        for axes in grid[-1]:
            axes.set_xlabel("image edge, pixels")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(counts)), frameon=False, fontsize=9)
        figure.savefig(harness.RESULTS / "attention.png", dpi=150)


def measured(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a table without those of networks that could not be measured."""
    return [row for row in json.loads(path.read_text())["rows"] if row["of"] != "-"] if path.is_file() else []


def points(row: dict[str, Any]) -> dict[int, float]:
    return {int(key): value for key, value in row.items() if key.isdigit()}


def plot(axes: Axes, rows: list[dict[str, Any]]) -> None:
    of = {row["network"]: points(row) for row in rows}
    for name, (colour, line, label) in STYLES.items():
        if name in of:
            axes.plot(*zip(*of[name].items(), strict=True), line, color=colour, lw=1.8, marker="o", ms=3, label=label)
    edges = list(points(rows[0]))
    axes.set(xscale="log", yscale="log", xlim=(edges[0] * 0.93, edges[-1] * 1.05))
    axes.set_xticks(edges, [str(edge) for edge in edges], fontsize=8)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
