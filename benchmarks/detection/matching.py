"""Compares log_sinkhorn with the unrolled loop, and counts how many keypoints of neighbouring slices match.

python -m benchmarks.detection.matching [--data ../shared/data/sunnybrook] [--only sinkhorn slices] [--threads 1]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.harness import Row, parser, report
from benchmarks.common.measuring import DEVICE, compare, saved_bytes
from kaf_layer.detection import SIFTDetector
from kaf_layer.matching import log_sinkhorn, match_keypoints

BATCH, ITERATIONS = 8, 100
PARTS = ("sinkhorn", "slices")


def unrolled(scores: Tensor, dustbin: Tensor) -> Tensor:
    """Runs Sinkhorn's iterations in the log domain (Sarlin et al., 2020) with plain autograd."""
    batch, rows, columns = scores.shape
    z = torch.cat([scores, dustbin.expand(batch, rows, 1)], dim=2)
    z = torch.cat([z, dustbin.expand(batch, 1, columns + 1)], dim=1)
    log_rows, log_columns = scores.new_zeros(rows + 1), scores.new_zeros(columns + 1)
    log_rows[-1], log_columns[-1] = np.log(columns), np.log(rows)
    v = torch.zeros_like(z[:, 0])
    for _ in range(ITERATIONS):
        u = log_rows - (z + v[:, None]).logsumexp(dim=2)
        v = log_columns - (z + u[:, :, None]).logsumexp(dim=1)
    return z + u[:, :, None] + v[:, None]


def sinkhorn(points: int, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    scores = (3 * torch.randn(BATCH, points, points, device=DEVICE)).requires_grad_()
    dustbin = torch.tensor(1.0, device=DEVICE, requires_grad=True)
    weights = torch.rand(BATCH, points + 1, points + 1, device=DEVICE)
    functions: dict[str, Callable[[], Tensor]] = {
        "unrolled": lambda: unrolled(scores, dustbin),
        "log_sinkhorn": lambda: log_sinkhorn(scores, dustbin, iterations=ITERATIONS),
    }

    def both_ways(function: Callable[[], Tensor]) -> None:
        torch.autograd.grad((function() * weights).sum(), (scores, dustbin))

    forward = compare(dict(functions), repeats=repeats)
    both = compare({name: partial(both_ways, function) for name, function in functions.items()}, repeats=repeats)
    saved = {name: saved_bytes(function, aside=(scores, dustbin)) for name, function in functions.items()}
    return [
        {
            "points": points,
            "": name,
            "forward, ms": forward[name] * 1e3,
            "forward and backward, ms": both[name] * 1e3,
            "times faster": both["unrolled"] / both[name],
            "saved, MB": saved[name] / 1e6,
            "times less": saved["unrolled"] / saved[name],
        }
        for name in functions
    ]


def slices(folder: Path) -> list[Row]:
    """Counts matches between neighbouring slices of all end-diastolic stacks, by distance."""
    import nibabel

    detector = SIFTDetector(max_keypoints=512).to(DEVICE)
    pairs = []
    for file in sorted(folder.glob("*/*_ED.nii.gz")):
        volume = np.asarray(nibabel.Nifti1Image.from_filename(file).dataobj, dtype=np.float32)
        keypoints = detector(torch.from_numpy(volume).permute(2, 1, 0)[:, None].to(DEVICE))
        pairs.append((keypoints[:-1], keypoints[1:]))
    counts = torch.cat([a.valid.sum(dim=1) for a, _ in pairs]).tolist()
    rows: list[Row] = []
    for max_distance in (5, 10, 20, 30, 40):
        row: Row = {"distance, px": max_distance}
        for name, mutual in (("mutual", True), ("one-sided", False)):
            matched = [
                (match_keypoints(a, b, max_distance=max_distance, mutual=mutual).indices >= 0).sum(dim=1)
                for a, b in pairs
            ]
            found = torch.cat(matched).tolist()
            row[f"{name}: matches a pair (median)"] = float(median(found))
            row[f"{name}: share of keypoints"] = sum(found) / sum(counts)
        rows.append(row)
    print(f"{len(counts)} pairs of slices, {median(counts):.0f} keypoints per slice (median)")
    return rows


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--data", type=Path, default=Path("../shared/data/sunnybrook"), help="Sunnybrook's folder, if any")
    own.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    own.add_argument("--points", type=int, nargs="+", default=[128, 512], help="numbers of points on each side")
    own.add_argument("--repeats", type=int, default=5, help="how often each run is timed; the median counts")
    own.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    arguments = own.parse_args()
    torch.set_num_threads(arguments.threads)
    if "sinkhorn" in arguments.only:
        rows = (row for points in arguments.points for row in sinkhorn(points, arguments.repeats))
        notes = (
            f"Sinkhorn's algorithm with batch {BATCH}, {ITERATIONS} iterations, a dustbin on either side and float32. "
            f"Times are medians of {arguments.repeats} alternating runs. Saved: what is kept for the backward pass, "
            "besides the given scores."
        )
        report("matching-sinkhorn", rows, notes=notes)
    if "slices" in arguments.only and arguments.data.is_dir():
        notes = (
            "match_keypoints between neighbouring slices of Sunnybrook's end-diastolic stacks, with keypoints of "
            "SIFTDetector(512): the nearest descriptor within a Manhattan distance."
        )
        report("matching-slices", slices(arguments.data), notes=notes, packages=["nibabel"])


if __name__ == "__main__":
    main()
