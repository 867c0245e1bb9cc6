"""When does long-range attention help? Against distance and receptive field, beside the backbone and its peers.

    python benchmarks/context.py synthetic                                    # about half an hour on two cores
    python benchmarks/context.py sunnybrook --data ../shared/data/sunnybrook  # hours; each run in minutes
    python benchmarks/context.py lumbar --data ../shared/data/lumbar          # a day of a core

synthetic: the task of context_task.py, accuracy against the distance between target and marker. sunnybrook: Dice of
unseen subjects on the whole field of view, for UNets of 3, 4 and 5 levels, whose receptive fields are smaller and
larger than the image; of added layers also with a loss on their tokens. lumbar: the same for five vertebrae, which
look alike, for UNets of 4 and 5 levels and layers with each encoding of positions. All go on where they were killed;
all draw context.png beside the tables, from what is there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import harness
import torch
import torch.nn.functional as F
from context_figure import draw
from context_task import EDGE, FARTHEST, IGNORED, NEAREST, GlobalAttention, Task, draw_task
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent))
from examples.protocol.files import read_json, write_json
from examples.unet import KAFUNet, UNet, UNetC2

LEVELS, WIDTH = 3, 8
TESTED = 500  # images
BINS = (NEAREST, 28, 40, 52, 64, FARTHEST)  # of the distance, in pixels
ATTENTION = {"embed_dim": 64, "depth": 2}
METHODS = {
    "unet": "UNet",
    "unet-c2": "UNet (c2)",
    "kaf-unet": "KAF-UNet",
    "kaf-unet --fusion add": "KAF-UNet, added",
    "kaf-unet --fusion add --token-loss 0.5": "KAF-UNet, added, loss on tokens",
}
POSITIONS = {
    "kaf-unet --position rotary": "KAF-UNet, rotary positions",
    "kaf-unet --position both": "KAF-UNet, rotary and absolute positions",
    "kaf-unet --fusion add --position rotary": "KAF-UNet, added, rotary positions",
}


class DataSet(NamedTuple):
    """Of which Dice is measured by receptive field: the levels of the UNets, and the methods beside them."""

    levels: Sequence[int]
    methods: dict[str, str]


DATA_SETS = {"sunnybrook": DataSet((3, 4, 5), METHODS), "lumbar": DataSet((4, 5), METHODS | POSITIONS)}


def swin() -> nn.Module:
    """MONAI's SwinUNETR, whose layers see windows of 7, of pixels half to a 32nd as fine as the image's."""
    from monai.networks.nets import SwinUNETR

    from examples.protocol.networks import WithoutKeypoints

    return WithoutKeypoints(SwinUNETR(1, 2, feature_size=12, spatial_dims=2))


def global_attention() -> nn.Module:
    """All patches of 16x16 image pixels attend to each other, on the scales of the KAF layers."""
    layers = [GlobalAttention(WIDTH * 2**i, patch=16 // 2**i, **ATTENTION) for i in range(LEVELS - 1)]
    return UNet(1, 2, width=WIDTH, layers=layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": lambda: UNet(1, 2, width=WIDTH, layers=[None] * (LEVELS - 1)),
    "UNet (c2)": lambda: UNetC2(1, 2, width=WIDTH, levels=LEVELS),
    "KAF-UNet": lambda: KAFUNet(1, 2, width=WIDTH, levels=LEVELS, **ATTENTION),
    "KAF-UNet, added": lambda: KAFUNet(1, 2, width=WIDTH, levels=LEVELS, fusion="add", **ATTENTION),
    "SwinUNETR": swin,
    "global attention": global_attention,
}


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


def by_field(options: argparse.Namespace) -> None:
    """Cross-validates every method with every number of levels, unless given runs, and reports Dice by their field."""
    from examples.protocol import cross_validate
    from examples.protocol.comparison import difference, runs_ahead

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
            results = cross_validate.main([*arguments, "--jobs", str(options.jobs)])
        of = {name: [result for result in results if result["method"] == name] for name in methods}
        edge = results[0]["settings"]["patch"][0]
        field = 9 * 2 ** (levels - 1) - 4  # two convolutions 3x3 on each level, and halvings between
        for name in filter(of.get, methods):  # files of runs may lack some
            row = {"network": methods[name], "levels": levels, "receptive field / edge": field / edge}
            row["Dice"] = mean(cross_validate.over_folds(of[name], None))
            d = difference(of[name], of["unet"]) if name != "unet" else None
            row["ahead of UNet"] = f"{d.dice:+.3f}, p = {d.p:.2g}" if d else ""
            row["in folds"] = f"{d.ahead} of {d.folds}" if d else ""
            row["in runs"] = runs_ahead(of[name], of["unet"]) if d else ""
            row["by fold"] = " ".join(f"{gain:+.3f}" for gain in gains(of[name], of["unet"])) if d else ""
            rows.append(row)
    notes = (
        f"{options.part.capitalize()}, M = {count}, folds {options.folds}, seeds {options.seeds}; "
        "the field is that of the deepest block. Differences and p of a Wilcoxon signed-rank test are over subjects, "
        "each the mean of its volumes."
    )
    harness.report(f"context-{options.part}", rows, notes=notes, packages=["monai"])


def gains(results: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[float]:
    """How far the first are ahead of the others in each fold, by the mean over seeds of Dice."""
    folds = sorted({result["fold"] for result in results})
    dice = [[mean(r["dice"] for r in runs if r["fold"] == fold) for fold in folds] for runs in (results, others)]
    return [ours - theirs for ours, theirs in zip(*dice, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("part", choices=("synthetic", *DATA_SETS))
    parser.add_argument("--output", type=Path, default=Path("outputs/context"), help="a folder for single runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="synthetic")
    parser.add_argument("--steps", type=int, default=400, help="synthetic: of training")
    parser.add_argument("--images", type=int, default=3000, help="synthetic: to train on")
    parser.add_argument("--tested", type=int, default=TESTED, help="synthetic: images to test on")
    parser.add_argument("--data", type=Path, help="sunnybrook, lumbar: the folder")
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="of runs that are there, not to train")
    parser.add_argument("--levels", type=int, nargs="+", help="sunnybrook, lumbar: of the UNets")
    parser.add_argument("--labelled", type=int, default=2, metavar="M", help="sunnybrook, lumbar: subjects to train on")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="sunnybrook, lumbar: to test")
    parser.add_argument("--jobs", type=int, default=1, help="sunnybrook, lumbar: folds at a time")
    options = parser.parse_args(arguments)
    if options.part in DATA_SETS and options.data is None and not options.results:
        parser.error(f"{options.part} needs --data, the folder of its volumes")
    (by_field if options.part in DATA_SETS else synthetic)(options)
    draw()


if __name__ == "__main__":
    main()
