"""How much does a rerun move? The runs that two files of results have in common, with the same seeds, side by side.

    python -m benchmarks.context.reruns FIRST.json SECOND.json

For example with sunnybrook-few-shot.json and sunnybrook-methods.json of benchmarks/results.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.common import harness


def changes(first: Sequence[dict], second: Sequence[dict]) -> dict[tuple[str, int], list[float]]:
    """By method and number of labelled subjects, the change of Dice of each fold and seed that was run twice."""
    before = {(r["method"], r["M"], r["fold"], r["seed"]): r for r in first}
    found = defaultdict(list)
    for run in second:
        other = before.get((run["method"], run["M"], run["fold"], run["seed"]))
        if other and other["scores"] != run["scores"]:  # equal scores are those of one run
            found[run["method"], run["M"]].append(run["dice"] - other["dice"])
    return dict(sorted(found.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("first", type=Path, help="a file of results")
    parser.add_argument("second", type=Path, help="another")
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
    notes = f"Dice in {options.second.name} less Dice in {options.first.name}, for runs of the same fold and seed."
    harness.report("reruns", rows, notes=notes, measured=False)


if __name__ == "__main__":
    main()
