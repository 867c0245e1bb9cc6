"""Shows how much a rerun changes Dice, by the runs that two files of results have in common.

    python -m benchmarks.context.reruns FIRST.json SECOND.json

benchmarks/results has two such files: sunnybrook-few-shot.json and sunnybrook-methods.json.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import harness
from examples.protocol.options import console


def changes(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """Returns the changes of Dice in runs of the same fold and seed, by method and number of labelled subjects."""
    before = {(r["method"], r["M"], r["fold"], r["seed"]): r for r in first}
    found = defaultdict(list)
    for run in second:
        other = before.get((run["method"], run["M"], run["fold"], run["seed"]))
        if other and other["scores"] != run["scores"]:  # with equal scores it is the same run
            found[run["method"], run["M"]].append(run["dice"] - other["dice"])
    return dict(sorted(found.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("first", type=Path, help="file of results")
    parser.add_argument("second", type=Path, help="another file of results")
    options = parser.parse_args(arguments)
    pairs = changes(*(json.loads(path.read_text()) for path in (options.first, options.second)))
    rows = [
        {
            "method": method,
            "M": labelled,
            "runs": len(moved),
            "mean change": f"{mean(moved):+.3f}",
            "largest change of a run": f"{max(map(abs, moved)):.3f}",
        }
        for (method, labelled), moved in pairs.items()
    ]
    notes = f"Dice in {options.second.name} minus Dice in {options.first.name}, for runs of the same fold and seed."
    harness.report("reruns", rows, notes=notes, measured=False)


if __name__ == "__main__":
    console.run(main)
