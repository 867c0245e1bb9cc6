"""Measures whether KAF layers help a trained network: a UNet, fine-tuned with and without attached layers.

    python -m benchmarks.context.attached --data ../shared/data/sunnybrook  # about 15 minutes on a core for each seed
    python -m benchmarks.context.attached --preset lumbar --data ../shared/data/lumbar  # about two hours
    python -m benchmarks.context.attached --preset lumbar --data ../shared/data/lumbar --network smp  # eight hours

The UNet is MONAI's or, with --network smp, one of segmentation-models-pytorch. In each fold it is trained on the
labelled subjects. It is then fine-tuned on them twice, from the same weights and with the same batches: as it is, and
with KAF layers behind all of its scales except the coarsest. Everything else is as in
examples/protocol/cross_validate.py with the same preset.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor, nn

from benchmarks.common import harness
from benchmarks.context.backbones import CHANNELS, NETWORKS, TITLES, Backbone, build
from examples.protocol.experiments.inference import evaluate
from examples.protocol.experiments.inputs import load_split, load_stacks
from examples.protocol.files import read_json, write_json
from examples.protocol.models.networks import WithoutKeypoints
from examples.protocol.options import Options, console, parse
from examples.protocol.results.comparison import difference, runs_ahead, spread
from examples.protocol.results.scores import mean_score
from examples.protocol.training.brief import fit
from examples.protocol.volumes.stacks import Stack
from kaf_layer import GridDetector, KAFLayer, Keypoints, SIFTDetector, attach
from kaf_layer.interop import KAFBackbone

BEFORE, WITHOUT, WITH = "UNet", "fine-tuned", "fine-tuned with layers attached"


class WithKeypoints(nn.Module):
    """A network with layers attached, which is given its keypoints."""

    def __init__(self, network: KAFBackbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, keypoints: Keypoints) -> Tensor:
        """Returns logits (B, K, H, W)."""
        logits: Tensor = self.network(images, keypoints=keypoints)
        return logits


def attach_layers(unet: nn.Module, names: dict[str, int], options: Options) -> nn.Module:
    """Attaches a layer behind each of a network's submodules that ``names`` gives with their channels."""
    is_grid = options.detector == "grid"
    # The spacing is in pixels of the resized slices.
    detector = GridDetector(options.spacing * options.resize) if is_grid else SIFTDetector(options.max_keypoints)
    width, depth, position = options.embed_dim, options.depth, options.position
    attached = attach(unet, names, detector=detector, embed_dim=width, depth=depth, position=position)
    # A grid lies in the augmented image as in any other. Other keypoints are detected once, and move with the image.
    return WithoutKeypoints(attached) if is_grid else WithKeypoints(attached)


def run_fold(
    backbone: Backbone, training: list[Stack], unseen: list[Stack], options: Options, *, steps: int, seed: int
) -> dict[str, Any]:
    """Returns the scores of the three networks on the unseen volumes of one fold."""
    unet, names = backbone
    fit(WithoutKeypoints(unet), training, steps=steps, lr=options.lr, seed=seed)
    attached = attach_layers(deepcopy(unet), names, options)
    networks = {
        BEFORE: WithoutKeypoints(deepcopy(unet)),
        WITHOUT: WithoutKeypoints(unet),
        WITH: attached,
    }
    scores = {}
    for name, module in networks.items():
        if name != BEFORE:
            fit(module, training, steps=steps, lr=options.lr, seed=seed + 1)
        rows = evaluate(module, unseen, classes=options.classes)
        scores[name] = [[stack.volume.subject, *row] for stack, row in zip(unseen, rows, strict=True)]
    gains = [layer.gain.abs().mean().item() for layer in attached.modules() if isinstance(layer, KAFLayer)]
    return {"scores": scores, "gains": gains}


def of_network(run: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns one network's scores and Dice of a run, in the form of a result of cross-validation."""
    scores = run["scores"][name]
    return run | {"scores": scores, "dice": mean_score([row[1:] for row in scores])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--preset", choices=CHANNELS, default="sunnybrook", help="the data set")
    parser.add_argument("--network", choices=NETWORKS, default="monai", help="the library of the UNet")
    parser.add_argument("--data", type=Path, required=True, help="its folder")
    parser.add_argument("--output", type=Path, default=Path("outputs/attached"), help="folder for single folds")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="folds to test")
    parser.add_argument("--labelled", type=int, default=2, metavar="M", help="subjects to train on")
    parser.add_argument("--steps", type=int, help="steps of training, and again of fine-tuning (default: the preset's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training")
    options = parser.parse_args(arguments)
    protocol = parse(Options, ["--preset", options.preset, "--data", str(options.data), "--output", "unused"])
    steps = options.steps or protocol.epochs * (protocol.steps_per_epoch or 1)
    stacks = load_stacks(protocol)
    split = load_split(protocol, [stack.volume for stack in stacks])
    results = []
    for seed, fold in product(options.seeds, options.folds):
        file = options.output / options.preset / options.network / f"fold{fold}-M{options.labelled}-{steps}-{seed}.json"
        if not file.is_file():
            subjects = split[fold].labelled(options.labelled), split[fold].test
            training, unseen = ([s for s in stacks if s.volume.subject in names] for names in subjects)
            backbone = build(options.network, options.preset, protocol.classes, seed=seed)
            write_json(run_fold(backbone, training, unseen, protocol, steps=steps, seed=seed), file)
        results.append({"fold": fold, "seed": seed} | read_json(file))
    rows = []
    of = {name: [of_network(run, name) for run in results] for name in (BEFORE, WITHOUT, WITH)}
    for name, own in of.items():
        folds = [mean(run["dice"] for run in own if run["fold"] == fold) for fold in options.folds]
        ahead = difference(of[WITH], own) if name != WITH else None
        row: dict[str, object] = {"network": name, "Dice": spread(folds)}
        row["layers ahead by"] = f"{ahead.dice:+.3f}" if ahead else ""
        row["in folds"] = f"{ahead.ahead} of {ahead.folds}" if ahead else ""
        row["in runs"] = runs_ahead(of[WITH], own) if ahead else ""
        row["p"] = f"{ahead.p:.2g}" if ahead else ""
        rows.append(row)
    gain = mean(mean(result["gains"]) for result in results)
    notes = (
        f"{options.preset.capitalize()}, {TITLES[options.network]}, M = {options.labelled}, folds {options.folds}, "
        f"seeds {options.seeds}: {steps} steps of training and as many of fine-tuning, Adam {protocol.lr:g} with a "
        f"cosine, {protocol.position} positions. Dice: mean ± deviation over folds. p: Wilcoxon signed-rank test over "
        f"subjects. The gains of the layers grew from 0 to {gain:.2f} on average."
    )
    others = [name for name in (options.preset, options.network) if name not in ("sunnybrook", "monai")]
    packages = ["monai", *(["segmentation_models_pytorch"] if options.network == "smp" else [])]
    harness.report("-".join(["attached", *others]), rows, notes=notes, packages=packages)


if __name__ == "__main__":
    console.run(main)
