"""Trains the network of the bundle on Sunnybrook, and the same UNet without KAF layers.

    python -m examples.bundle.train --data ../shared/data/sunnybrook  # half an hour on one core, into outputs/bundle

The network is the one in ``configs/inference.json``, which can load its weights. Both networks start from the same
backbone and are trained on the same batches of augmented slices. The first --labelled subjects of a fold of the
committed split are for training, all other subjects are for testing. Slices are transposed, since MONAI's LoadImage
puts x first. The command writes model.pt (the bundle's weights), unet.pt and model.json (settings, split and scores).
"""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from torch import nn

from examples.protocol.experiments.finetuning import versions
from examples.protocol.experiments.inference import evaluate
from examples.protocol.files import read_json, save, write_json
from examples.protocol.models.networks import WithoutKeypoints
from examples.protocol.results.scores import mean_score
from examples.protocol.training.brief import fit
from examples.protocol.volumes.loading import load_volumes
from examples.protocol.volumes.stacks import Stack, prepare

BUNDLE = Path(__file__).parent
SPLIT = BUNDLE.parents[1] / "benchmarks" / "results" / "sunnybrook-split.json"


def load_slices(data: Path, detector: nn.Module) -> list[Stack]:
    """The data set's volumes as slices of 96x96 pixels, the whole field of view, x first."""
    volumes = [replace(v, image=v.image.mT, label=v.label.mT) for v in load_volumes(data, classes=2)]
    return prepare(volumes, detector, patch=(96, 96), resize=0.375, by_slice=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of Sunnybrook")
    parser.add_argument("--output", type=Path, default=Path("outputs/bundle"), help="a folder for weights and scores")
    parser.add_argument("--fold", type=int, default=0, help="of the split, whose training subjects are taken")
    parser.add_argument("--labelled", type=int, default=12, metavar="M", help="subjects to train on")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    config = ConfigParser()
    config.read_config(BUNDLE / "configs" / "inference.json")
    with_layers = config.get_parsed_content("network_def")
    networks = {"unet": deepcopy(with_layers.backbone), "model": with_layers}
    stacks = load_slices(options.data, with_layers.detector)
    chosen = read_json(SPLIT)["folds"][options.fold]["train"][: options.labelled]
    training, unseen = ([s for s in stacks if (s.volume.subject in chosen) == wanted] for wanted in (True, False))
    result: dict[str, object] = {"settings": {k: v for k, v in vars(options).items() if k not in ("data", "output")}}
    result |= {"train": chosen, "test": sorted({s.volume.subject for s in unseen}), "versions": versions()}
    for name, network in networks.items():
        fit(WithoutKeypoints(network), training, steps=options.steps, lr=options.lr, seed=options.seed)
        rows = evaluate(WithoutKeypoints(network), unseen, classes=2)
        scores = [[s.volume.subject, *row] for s, row in zip(unseen, rows, strict=True)]
        count = sum(parameter.numel() for parameter in network.parameters())
        result[name] = {"dice": round(mean_score(rows), 4), "parameters": count, "scores": scores}
        save(network.state_dict(), options.output / f"{name}.pt")
        print(f"{name}: {count} parameters, Dice {mean_score(rows):.3f} on {len(unseen)} volumes", flush=True)
    write_json(result, options.output / "model.json")


if __name__ == "__main__":
    main()
