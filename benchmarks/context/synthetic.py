"""When does long-range attention help? Accuracy against distance, on a task that needs distance and nothing else.

    python -m benchmarks.context.synthetic  # about half an hour on two cores

The task is that of task.py. A run that was stopped goes on where it was when the same command is given again. The
results are also drawn, as context.png next to the tables.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import harness
from benchmarks.context.figure import draw
from benchmarks.context.networks import LEVELS, NETWORKS, WIDTH
from benchmarks.context.task import EDGE, FARTHEST, IGNORED, NEAREST, Task, draw_task
from examples.protocol.files import read_json, write_json

TESTED = 500  # images
BINS = (NEAREST, 28, 40, 52, 64, FARTHEST)  # of the distance, in pixels


@torch.no_grad()
def receptive_radius(network: nn.Module, *, edge: int = 256) -> int:
    """How far, in pixels, one input pixel is felt: a NaN there spreads exactly so far. For networks of convolutions."""
    images = torch.zeros(1, 1, edge, edge)
    centre = edge // 2
    images[..., centre, centre] = torch.nan
    columns = network.eval()(images).isnan().any(1).any(1)[0].nonzero().flatten()
    return int((columns - centre).abs().max())


def train(network: nn.Module, task: Task, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Cross-entropy on the target's pixels alone; the learning rate falls to zero along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    network.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        part = task[torch.randint(len(task.images), (batch,), generator=generator)]
        loss = F.cross_entropy(network(part.images, part.keypoints), part.labels, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def judge(network: nn.Module, task: Task) -> Tensor:
    """For each image, whether most of the target's pixels get its class."""
    network.eval()
    right = []
    for start in range(0, len(task.images), 50):
        part = task[slice(start, start + 50)]
        asked = part.labels != IGNORED
        hits = (network(part.images, part.keypoints).argmax(1) == part.labels) & asked
        right.append(hits.sum((1, 2)) * 2 > asked.sum((1, 2)))
    return torch.cat(right)


def synthetic(options: argparse.Namespace) -> None:
    """Trains every network with every seed, unless its result is there, and reports accuracy by distance."""
    runs = [(name, seed) for seed in options.seeds for name in options.networks]
    files = {run: options.output / "synthetic" / f"{run[0]}-{run[1]}-{options.steps}.json" for run in runs}
    tasks: dict[int, tuple[Task, Task]] = {}
    for (name, seed), file in files.items():
        if not file.is_file():
            if seed not in tasks:
                tasks = {seed: (draw_task(options.images, seed=2 * seed), draw_task(options.tested, seed=2 * seed + 1))}
            training, test = tasks[seed]
            torch.manual_seed(seed)
            network = NETWORKS[name]()
            train(network, training, steps=options.steps, batch=8, lr=1e-3, seed=seed)
            right = judge(network, test)
            print(f"{name}, seed {seed}: {right.float().mean():.3f}", flush=True)
            write_json({"distances": test.distances.tolist(), "right": right.tolist()}, file)
    rows = [row_of(name, [read_json(files[name, seed]) for seed in options.seeds]) for name in options.networks]
    radius = receptive_radius(NETWORKS["UNet"]())
    notes = (
        f"Accuracy on {options.tested} unseen images of {EDGE}x{EDGE}, seeds {options.seeds}, by the distance between "
        f"target and marker in pixels; the UNet's receptive field reaches {radius} pixels. {options.steps} steps of "
        f"batch 8 on {options.images} images, Adam 1e-3, cosine, cross-entropy on the target. UNets of {LEVELS} levels "
        f"and width {WIDTH}; tokens of 64 channels, 2 blocks on each scale. GFLOPs: forward pass, one image, a "
        "multiply-add being 2."
    )
    harness.report("context-synthetic", rows, notes=notes, packages=["monai"])


def row_of(name: str, results: Sequence[dict[str, list[Any]]]) -> dict[str, object]:
    """A network's accuracy in bins of distance, over all seeds."""
    distances = torch.cat([torch.tensor(result["distances"]) for result in results])
    right = torch.cat([torch.tensor(result["right"]) for result in results]).float()
    part = draw_task(1, seed=0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        flops = harness.count_flops(lambda: network(part.images, part.keypoints))
    row: dict[str, object] = {"network": name, "GFLOPs": flops / 1e9}
    for low, high in pairwise(BINS):
        row[f"{low}-{high}"] = float(right[(distances >= low) & (distances < high)].mean())
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/context"), help="a folder for single runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--images", type=int, default=3000, help="to train on")
    parser.add_argument("--tested", type=int, default=TESTED, help="images to test on")
    synthetic(parser.parse_args(arguments))
    draw()


if __name__ == "__main__":
    main()
