"""Measures accuracy by distance, on a task that needs distance and nothing else.

    python -m benchmarks.context.synthetic  # about half an hour on two cores

The task is in task.py. If the command is interrupted, it resumes where it was when it is run again. The results are
also drawn, as context.png next to the tables.
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
from benchmarks.common.measuring import count_flops
from benchmarks.context.figure import draw
from benchmarks.context.networks import LEVELS, NETWORKS, WIDTH
from benchmarks.context.task import EDGE, FARTHEST, IGNORED, NEAREST, Task, draw_task
from examples.protocol.files import read_json, write_json

TESTED = 500  # images
BINS = (NEAREST, 28, 40, 52, 64, FARTHEST)  # of the distance, in pixels


@torch.no_grad()
def receptive_radius(network: nn.Module, *, edge: int = 256) -> int:
    """Returns how far an input pixel has influence, in pixels: as far as a NaN spreads through convolutions."""
    images = torch.zeros(1, 1, edge, edge)
    centre = edge // 2
    images[..., centre, centre] = torch.nan
    columns = network.eval()(images).isnan().any(1).any(1)[0].nonzero().flatten()
    return int((columns - centre).abs().max())


def train(network: nn.Module, task: Task, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """Trains with cross-entropy on the target's pixels. The learning rate falls to zero along a cosine."""
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
    """Returns for each image whether most of the target's pixels get the right class."""
    network.eval()
    right = []
    for start in range(0, len(task.images), 50):
        part = task[slice(start, start + 50)]
        asked = part.labels != IGNORED
        hits = (network(part.images, part.keypoints).argmax(1) == part.labels) & asked
        right.append(hits.sum((1, 2)) * 2 > asked.sum((1, 2)))
    return torch.cat(right)


def synthetic(options: argparse.Namespace) -> None:
    """Trains each network with each seed, unless its result exists, and reports accuracy by distance."""
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
        f"Accuracy on {options.tested} unseen images of {EDGE}x{EDGE} pixels, seeds {options.seeds}, by the distance "
        f"between target and marker in pixels. The UNet's receptive field reaches {radius} pixels. Training: "
        f"{options.steps} steps of batch 8 on {options.images} images, Adam 1e-3 with a cosine, cross-entropy on the "
        f"target. UNets have {LEVELS} levels and width {WIDTH}, tokens have 64 channels, and each scale has 2 blocks. "
        "GFLOPs: forward pass of one image; a multiply-add is 2."
    )
    harness.report("context-synthetic", rows, notes=notes, packages=["monai"])


def row_of(name: str, results: Sequence[dict[str, list[Any]]]) -> dict[str, object]:
    """Returns a network's accuracy in bins of distance, over all seeds."""
    distances = torch.cat([torch.tensor(result["distances"]) for result in results])
    right = torch.cat([torch.tensor(result["right"]) for result in results]).float()
    part = draw_task(1, seed=0)
    network = NETWORKS[name]().eval()
    with torch.no_grad():
        flops = count_flops(lambda: network(part.images, part.keypoints))
    row: dict[str, object] = {"network": name, "GFLOPs": flops / 1e9}
    for low, high in pairwise(BINS):
        row[f"{low}-{high}"] = float(right[(distances >= low) & (distances < high)].mean())
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/context"), help="folder for single runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of data and training")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks to compare")
    parser.add_argument("--steps", type=int, default=400, help="steps of training")
    parser.add_argument("--images", type=int, default=3000, help="images to train on")
    parser.add_argument("--tested", type=int, default=TESTED, help="images to test on")
    synthetic(parser.parse_args(arguments))
    draw()


if __name__ == "__main__":
    main()
