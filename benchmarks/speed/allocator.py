"""Measures the diffusion on a CPU with memory returned to the system after each step, and with memory kept.

python -m benchmarks.speed.allocator [--edge 512] [--repeats 11]

By default, glibc returns large blocks at once. Each step then uses fresh pages, which the system must clear first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.harness import ROOT, parser, report
from benchmarks.common.measuring import compare
from benchmarks.speed.passes import random_keypoints
from benchmarks.speed.plain import PlainDiffusion
from kaf_layer import KeypointDiffusion

KEPT = {
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "-1",
}
CHANNELS, KEYPOINTS = 32, 512

NOTES = f"""Forward and backward pass of the diffusion network in training mode, behind a map of {CHANNELS} channels,
with {KEYPOINTS} keypoints, batch 1 and float32: medians of alternating runs. "torch.cat" computes nothing: it puts two
such maps side by side, and its backward pass copies nothing. glibc keeps memory with these environment variables:
{" ".join(f"{key}={value}" for key, value in KEPT.items())}"""


def measure(edge: int, repeats: int) -> dict[str, float]:
    """Returns the seconds of a step in this process and its environment."""
    torch.manual_seed(0)
    keypoints, size = random_keypoints(1, KEYPOINTS, edge), (edge, edge)
    plain, ours = PlainDiffusion(256, CHANNELS), KeypointDiffusion(256, CHANNELS)
    tokens = torch.randn(1, KEYPOINTS, 256, requires_grad=True)
    features, other = (torch.randn(1, CHANNELS, *size, requires_grad=True) for _ in range(2))
    forwards: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: torch.cat([features, plain(tokens, keypoints, size)], dim=1),
        "ours": lambda: ours(tokens, keypoints, size, features=features),
        "torch.cat": lambda: torch.cat([features, other], dim=1),
    }
    gradient = torch.ones(1, 2 * CHANNELS, *size)  # as dense as a network's, and allocated before the runs
    leaves = [tokens, features, other, *plain.parameters(), *ours.parameters()]

    def step(name: str) -> None:
        forwards[name]().backward(gradient)
        for leaf in leaves:
            leaf.grad = None

    return compare({name: partial(step, name) for name in forwards}, repeats=repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("--edge", type=int, default=512, help="edge of the map")
    own.add_argument("--repeats", type=int, default=11, help="how often each run is timed; the median counts")
    own.add_argument("--here", action="store_true", help="measure in this environment and print JSON")
    options = own.parse_args(arguments)
    if options.here:
        print(json.dumps(measure(options.edge, options.repeats)))
        return
    rows = []
    command = [sys.executable, "-m", "benchmarks.speed.allocator", "--here"]
    command += ["--edge", str(options.edge), "--repeats", str(options.repeats)]
    for name, environment in {"given back": {}, "kept": KEPT}.items():
        variables = os.environ | environment
        done = subprocess.run(command, env=variables, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
        seconds = json.loads(done.stdout)
        row: dict[str, object] = {"memory": name} | {f"{run}, ms": 1e3 * value for run, value in seconds.items()}
        row |= {
            "plain / ours": seconds["plain"] / seconds["ours"],
            "ours / cat": seconds["ours"] / seconds["torch.cat"],
        }
        rows.append(row)
    report("allocator", rows, notes=NOTES)


if __name__ == "__main__":
    main()
