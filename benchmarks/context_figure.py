"""Draws what context.py measured, as context.png beside the tables: accuracy by distance, Dice by receptive field."""

from __future__ import annotations

import json
import re

import harness
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = {
    "UNet": ("#6b6b6b", "-", "o"),
    "UNet (c2)": ("#c4c4c4", "-", "o"),
    "KAF-UNet": ("#c2185b", "-", "o"),
    "KAF-UNet, added": ("#f3a3c0", "-", "s"),
    "KAF-UNet, added, loss on tokens": ("#f3a3c0", "--", "D"),
    "SwinUNETR": ("#2b9a8b", "-", "^"),
    "global attention": ("#1f6fb4", "-", "v"),
}


def draw() -> None:
    """A panel for each part whose results are there."""
    panels = {"context-synthetic-cpu": draw_synthetic, "context-sunnybrook-cpu": draw_sunnybrook}
    found = {name: path for name in panels if (path := harness.RESULTS / f"{name}.json").is_file()}
    with rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5 * len(found), 3.6), layout="constrained", facecolor="white")
        for axes, (name, path) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            panels[name](axes, json.loads(path.read_text()))
        figure.savefig(harness.RESULTS / "context.png", dpi=120)


def draw_synthetic(axes: Axes, content: dict) -> None:
    radius = int(re.search(r"reaches (\d+) pixels", content["notes"])[1])
    for row in content["rows"]:
        bins = {tuple(map(int, name.split("-"))): value for name, value in row.items() if name[0].isdigit()}
        places = [(low + high) / 2 / radius for low, high in bins]
        colour, style, marker = STYLES[row["network"]]
        size = 4 - 0.6 * content["rows"].index(row)  # so that lines show that lie upon each other
        axes.plot(places, bins.values(), style, marker=marker, color=colour, lw=size, ms=3 * size, label=row["network"])
    axes.axvline(1, color="#9e9e9e", lw=0.8)
    axes.axhline(0.5, color="#9e9e9e", lw=0.8, ls=":")
    axes.text(1.05, 0.6, "end of the UNet's\nreceptive field", color="#6b6b6b", fontsize=8)
    axes.set(ylim=(0.4, 1.02), xlabel="distance / reach of the UNet's receptive field", ylabel="accuracy")
    axes.set_title("A class told by a far marker (0.5 is a guess)", loc="left", fontsize=10.5)
    axes.legend(frameon=False, fontsize=8)


def draw_sunnybrook(axes: Axes, content: dict) -> None:
    for network in dict.fromkeys(row["network"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["network"] == network]
        colour, style, marker = STYLES[network]
        places = [row["receptive field / edge"] for row in rows]
        dice = [row["Dice"] for row in rows]
        axes.plot(places, dice, style, marker=marker, color=colour, lw=1.8, ms=4, label=network)
    axes.axvline(1, color="#9e9e9e", lw=0.8)
    axes.set(xlabel="receptive field of the deepest block / image edge", ylabel="Dice of unseen subjects")
    axes.set_title("Sunnybrook, whole field of view, 2 subjects labelled", loc="left", fontsize=10.5)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom - 0.3 * (top - bottom), top)  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="lower right")
