"""Measures the gain of Dice by the receptive field of the backbone.

    python -m benchmarks.context.by_field sunnybrook --data ../shared/data/sunnybrook  # hours; each run in minutes
    python -m benchmarks.context.by_field lumbar --data ../shared/data/lumbar          # days of a core
    python -m benchmarks.context.by_field sunnybrook --data ../shared/data/sunnybrook --epochs 160 --channels-last

sunnybrook: Dice of unseen subjects on the whole field of view, for UNets of 3, 4 and 5 levels, whose receptive fields
are smaller and larger than the image. Added layers are also trained with a loss on their tokens. lumbar: the same for
five vertebrae, which look alike, for UNets of 4 and 5 levels and layers with each encoding of positions. Options of
examples/protocol/cross_validate.py can be given too, as in the last line. If the command is interrupted, it resumes
where it was when it is run again. The results are also drawn, as context.png next to the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.common import harness
from benchmarks.context.figure import draw
from examples.protocol.files import read_json
from examples.protocol.options import console

METHODS = {
    "unet": "UNet",
    "unet-c2": "UNet (c2)",
    "kaf-unet": "KAF-UNet",
    "kaf-unet --fusion add": "KAF-UNet, added",
    "kaf-unet --fusion add --token-loss 0.5": "KAF-UNet, added, loss on tokens",
}
POSITIONS = {
    "kaf-unet --position rotary": "KAF-UNet, rotary positions",
    "kaf-unet --position absolute": "KAF-UNet, absolute positions",
}


class DataSet(NamedTuple):
    """What is measured on a data set: the levels of the UNets, and the methods by their names in the table."""

    levels: Sequence[int]
    methods: dict[str, str]


DATA_SETS = {"sunnybrook": DataSet((3, 4, 5), METHODS), "lumbar": DataSet((4, 5), METHODS | POSITIONS)}


def by_field(options: argparse.Namespace, more: Sequence[str]) -> None:
    """Cross-validates each method with each number of levels, unless runs are given, and reports Dice by field.

    Args:
        options: of this command.
        more: options of ``cross_validate``.
    """
    from examples.protocol import cross_validate
    from examples.protocol.results.comparison import difference, runs_ahead
    from examples.protocol.results.tables import over_folds

    rows, given = [], [run for file in options.results for run in read_json(file)]
    count, output, methods = options.labelled, options.output / options.part, DATA_SETS[options.part].methods
    for levels in options.levels or DATA_SETS[options.part].levels:
        arguments = ["--preset", options.part, "--data", str(options.data), "--levels", str(levels)]
        arguments += ["--labelled", str(count), "--methods", *methods, "--output", str(output / f"levels{levels}")]
        arguments += ["--test-folds", *map(str, options.folds), "--seeds", *map(str, options.seeds)]
        if given:
            chosen = {(levels, count, fold, seed) for fold in options.folds for seed in options.seeds}
            results = [r for r in given if (r["settings"]["levels"], r["M"], r["fold"], r["seed"]) in chosen]
        else:
            results = cross_validate.main([*arguments, "--jobs", str(options.jobs), *more])
        of = {name: [result for result in results if result["method"] == name] for name in methods}
        edge = results[0]["settings"]["patch"][0]
        field = 9 * 2 ** (levels - 1) - 4  # two 3x3 convolutions on each level, with halvings between levels
        for name in filter(of.get, methods):  # given runs may lack some, or some of their folds
            own = {(r["fold"], r["seed"]) for r in of[name]}
            unet = [r for r in of["unet"] if (r["fold"], r["seed"]) in own]
            row = {"network": methods[name], "levels": levels, "receptive field / edge": field / edge}
            row["Dice"] = mean(over_folds(of[name], None))
            d = difference(of[name], unet) if name != "unet" else None
            row["ahead of UNet"] = f"{d.dice:+.3f}, p = {d.p:.2g}" if d else ""
            row["in folds"] = f"{d.ahead} of {d.folds}" if d else ""
            row["in runs"] = runs_ahead(of[name], unet) if d else ""
            row["by fold"] = " ".join(f"{gain:+.3f}" for gain in gains(of[name], unet)) if d else ""
            rows.append(row)
    notes = (
        f"{options.part.capitalize()}, M = {count}, folds {options.folds}, seeds {options.seeds}, "
        f"{results[0]['settings']['epochs']} epochs; the receptive field is that of the deepest block. Differences and "
        "p-values (Wilcoxon signed-rank test) are over subjects; each counts by the mean of its volumes."
    )
    harness.report(f"context-{options.part}", rows, notes=notes, packages=["monai"])


def gains(results: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[float]:
    """Returns by how much Dice of the first exceeds that of the others in each fold, each a mean over seeds."""
    folds = sorted({result["fold"] for result in results})
    dice = [[mean(r["dice"] for r in runs if r["fold"] == fold) for fold in folds] for runs in (results, others)]
    return [ours - theirs for ours, theirs in zip(*dice, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("part", choices=tuple(DATA_SETS), help="the data set")
    parser.add_argument("--output", type=Path, default=Path("outputs/context"), help="folder for single runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training")
    parser.add_argument("--data", type=Path, help="folder of the volumes")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="finished runs to use instead of training")
    parser.add_argument("--levels", type=int, nargs="+", help="levels of the UNets; by default those of the data set")
    parser.add_argument("--labelled", type=int, default=2, metavar="M", help="subjects to train on")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="folds to test")
    parser.add_argument("--jobs", type=int, default=1, help="folds that run in parallel")
    options, more = parser.parse_known_args(arguments)
    if options.data is None and not options.results:
        parser.error(f"{options.part} needs --data, the folder of its volumes")
    if options.results and more:
        parser.error(f"finished runs are not trained, so --results and {' '.join(more)} do not fit together")
    by_field(options, more)
    draw()


if __name__ == "__main__":
    console.run(main)
