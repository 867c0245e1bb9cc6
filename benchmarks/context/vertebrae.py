"""Which vertebra does a network take each vertebra for? The share that is named one level off.

    python -m benchmarks.context.vertebrae outputs/context/lumbar/levels4/fold*/*/seed0/M2 --data ../shared/data/lumbar

The arguments are folders of finished runs of examples.protocol.finetune on the lumbar spines. Vertebrae look alike, so
a network finds a level by counting, and a level off is the error that context can mend. A vertebra is found if at least
half of its voxels are predicted to be some vertebra. It is then named by the most frequent of these predictions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.common import harness
from examples.protocol.experiments.inference import predict
from examples.protocol.experiments.inputs import prepare_volumes, read_volumes
from examples.protocol.experiments.runs import read_run
from examples.protocol.options import changed

OUTCOMES = ("right", "one level off", "further off", "not found")


def outcomes(predicted: Tensor, reference: Tensor) -> Iterator[str]:
    """One of OUTCOMES for each vertebra of the reference; labels (Z, H, W), where 0 is background."""
    for level in reference.unique().tolist():
        if level:
            inside = predicted[reference == level]
            found = inside[inside > 0]
            if 2 * len(found) < len(inside):
                yield "not found"
            else:
                off = abs(int(found.mode().values) - level)
                yield OUTCOMES[min(off, 2)]


def count(folder: Path, data: Path) -> tuple[str, Counter[str]]:
    """What a run is, and how often each outcome occurs on the subjects that it did not see."""
    run = read_run(folder / "weights.pt")
    options = changed(run.options, {"data": data})
    tested = [volume for volume in read_volumes(options) if volume.subject in run.subjects["test"]]
    counts: Counter[str] = Counter()
    for stack in prepare_volumes(tested, options):
        counts.update(outcomes(predict(run.model, stack), stack.volume.label))
    layers = f", {options.fusion}, {options.position} positions" if options.model.startswith("kaf") else ""
    return f"{options.model}{layers}, {options.levels} levels, M = {options.labelled}, {options.epochs} epochs", counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with weights.pt and result.json")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the volumes")
    options = parser.parse_args(arguments)
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    runs: Counter[str] = Counter()
    for folder in options.runs:
        name, found = count(folder, options.data)
        counts[name] += found
        runs[name] += 1
    rows = []
    for name, found in sorted(counts.items()):
        shares = {outcome: f"{found[outcome] / found.total():.1%}" for outcome in OUTCOMES}
        rows.append({"network": name, "runs": runs[name], "vertebrae": found.total(), **shares})
    notes = "Shares of the vertebrae of unseen subjects, over all runs of a network."
    harness.report("vertebrae", rows, notes=notes, packages=["monai"])


if __name__ == "__main__":
    main()
