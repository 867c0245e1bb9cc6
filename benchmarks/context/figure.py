"""Draws accuracy by distance (synthetic.py) and Dice by receptive field (by_field.py) as context.png."""

from __future__ import annotations

import json
import re
from statistics import mean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import harness

STYLES = {
    "UNet (c2)": ("#9e9e9e", "o"),
    "KAF-UNet": ("#c2185b", "o"),
    "KAF-UNet, added": ("#f08fb4", "s"),
    "KAF-UNet, added, loss on tokens": ("#8e5bb5", "D"),
    "KAF-UNet, rotary positions": ("#1f77b4", "o"),
    "KAF-UNet, absolute positions": ("#0b5345", "o"),
}


def draw() -> None:
    """Draws a panel for each table that exists, one below the other."""
    panels = {"context-synthetic-cpu": draw_synthetic}
    panels |= {"context-sunnybrook-cpu": draw_gains, "context-lumbar-cpu": draw_gains}
    found = {name: path for name in panels if (path := harness.RESULTS / f"{name}.json").is_file()}
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.6, 3.3 * len(found)), layout="constrained", facecolor="white")
        for axes, (name, path) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True):
            panels[name](axes, json.loads(path.read_text()))
        figure.savefig(harness.RESULTS / "context.png", dpi=150)


def draw_synthetic(axes: Axes, content: dict[str, Any]) -> None:
    """Draws a line for each network, so that none hides another, with a dot for each range of distances."""
    steps = told_in(content["notes"], r"(\d+) steps")[0]
    rows = content["rows"]
    for place, row in enumerate(rows):
        accuracies = [value for name, value in row.items() if name[0].isdigit()]
        shades = [0.25 + 0.75 * i / (len(accuracies) - 1) for i in range(len(accuracies))]
        axes.scatter(accuracies, [place] * len(accuracies), s=36, c=shades, cmap="Blues", vmin=0, edgecolors="#1f4e79")
        if row["network"] == "global attention":
            axes.text(max(accuracies) + 0.04, place, f"not learned after {steps} steps", va="center", color="#6b6b6b")
    axes.axvline(0.5, color="#6b6b6b", lw=0.8, ls=":")
    axes.text(0.49, -0.75, "guessing", color="#6b6b6b", ha="right")
    axes.set(xlim=(0, 1.03), ylim=(len(rows) - 0.5, -1.1), xlabel="accuracy on unseen images (darker: farther marker)")
    axes.set_yticks(range(len(rows)), [row["network"] for row in rows])
    axes.set_title("Synthetic: the class depends on a distant marker", loc="left", fontsize=10.5)


def draw_gains(axes: Axes, content: dict[str, Any]) -> None:
    """Draws gains over the UNet with as many levels: means over folds with standard errors."""
    rows = content["rows"]
    levels = list(dict.fromkeys(row["levels"] for row in rows))
    axes.axhline(0, color="#6b6b6b", lw=0.8)
    shown = {name: style for name, style in STYLES.items() if any(row["network"] == name for row in rows)}
    for i, (network, (colour, marker)) in enumerate(shown.items()):
        own = [row for row in rows if row["network"] == network]
        gains = [[float(gain) for gain in row["by fold"].split()] for row in own]
        errors = [stdev(gain) / len(gain) ** 0.5 if len(gain) > 1 else 0.0 for gain in gains]
        places = [levels.index(row["levels"]) + 0.56 * ((i + 0.5) / len(shown) - 0.5) for row in own]
        style: dict[str, Any] = {"fmt": marker, "color": colour, "ms": 6, "capsize": 3, "lw": 1.4, "label": network}
        axes.errorbar(places, [mean(gain) for gain in gains], errors, **style)
    unets = {row["levels"]: row for row in rows if row["network"] == "UNet"}
    names = [
        f"{level} levels: sees {row['receptive field / edge']:.2f}\nof the image's edge\n(UNet: Dice {row['Dice']:.3f})"
        for level, row in unets.items()
    ]
    axes.set_xticks(range(len(levels)), names, fontsize=8.5)
    axes.set(xlim=(-0.5, len(levels) - 0.5), ylabel="gain of Dice over the UNet")
    data, labelled = told_in(content["notes"], r"(\w+), M = (\d+)")
    axes.set_title(f"{data}, {labelled} labelled subjects: gain by receptive field", loc="left", fontsize=10.5)
    axes.legend(frameon=False, fontsize=9)


def told_in(notes: str, pattern: str) -> tuple[str, ...]:
    """Returns the groups of a pattern that the notes of a table contain."""
    found = re.search(pattern, notes)
    if found is None:
        raise ValueError(f"the notes must contain {pattern}, got {notes}")
    return found.groups()
