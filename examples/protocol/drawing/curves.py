"""The training loss of each method of a cross-validation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.protocol.options.table import title


def draw_curves(results: Sequence[dict[str, Any]]) -> Figure:
    """Draws the mean loss of each epoch over folds and seeds, with axes for each number of labelled subjects."""
    counts = list(dict.fromkeys(result["M"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    figure = Figure(figsize=(1 + 2.4 * len(counts), 2.8 + 0.2 * -(-len(methods) // 2)), layout="constrained")
    lines = {}
    for axis, count in zip(figure.subplots(1, len(counts), squeeze=False, sharey=True)[0], counts, strict=True):
        for i, name in enumerate(methods):
            losses = [result["losses"] for result in results if (result["M"], result["method"]) == (count, name)]
            if losses:
                epochs = np.arange(1, len(losses[0]) + 1)
                (lines[title(name)],) = axis.plot(epochs, np.mean(losses, axis=0), lw=1.4, color=f"C{i % 10}")
        axis.set(title=f"M = {count}", xlabel="epoch", yscale="log")
    figure.axes[0].set_ylabel("training loss")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
