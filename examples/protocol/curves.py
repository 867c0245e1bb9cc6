"""Draws the training loss of each method that cross_validate.py ran: has it flattened?

python -m examples.protocol.curves outputs/table  # reads results.json there, writes curves.png beside it
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.protocol.cross_validate import title
from examples.protocol.files import read_json


def draw_curves(results: Sequence[dict[str, Any]]) -> Figure:
    """The mean loss of each epoch over folds and seeds, an axis for each number of labelled subjects."""
    counts = list(dict.fromkeys(result["M"] for result in results))
    figure = Figure(figsize=(1 + 3.6 * len(counts), 3.4), layout="constrained")
    for axis, count in zip(figure.subplots(1, len(counts), squeeze=False, sharey=True)[0], counts, strict=True):
        of_method = defaultdict(list)
        for result in results:
            if result["M"] == count:
                of_method[result["method"]].append(result["losses"])
        for name, losses in of_method.items():
            axis.plot(np.arange(1, len(losses[0]) + 1), np.mean(losses, axis=0), lw=1.2, label=title(name))
        axis.set(title=f"M = {count}", xlabel="epoch", yscale="log")
    figure.axes[0].set_ylabel("training loss")
    figure.axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --output of cross_validate.py")
    folder = parser.parse_args(arguments).folder
    draw_curves(read_json(folder / "results.json")).savefig(folder / "curves.png", dpi=150)
    print(f"wrote {folder / 'curves.png'}")


if __name__ == "__main__":
    main()
