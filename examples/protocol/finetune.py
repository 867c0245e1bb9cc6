"""Trains a network on the slices of few labelled subjects, and tests it on the volumes of unseen ones.

    python -m examples.protocol.finetune --output outputs/finetune --labelled 2                     # phantoms
    python -m examples.protocol.finetune --preset acdc --data ACDC/training --fold 0 --labelled 6 \
        --pretrained outputs/pretrain/weights.pt --output outputs/acdc
    torchrun --nproc-per-node 2 -m examples.protocol.finetune --output outputs/two                  # also on a CPU

The defaults are the paper's: Adam, cross-entropy, batches of 10 slices, learning rate and epochs by --preset.
Writes weights.pt, a plain state dict; result.json; split.json, to be given to --split; TensorBoard's logs.
"""

import argparse
import hashlib
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from monai.losses import DiceCELoss
from torch import Tensor, nn
from tqdm import tqdm

import kaf_layer
from examples.protocol import scripts
from examples.protocol.augmentation import Augmentation
from examples.protocol.data import axes_of
from examples.protocol.detectors import redetector
from examples.protocol.files import claimed, read_json, save, write_json
from examples.protocol.networks import build_model
from examples.protocol.recipes import keep_split, load_split, load_stacks, parse, parser_of
from examples.protocol.scores import Scores, mean_score, missed, score
from examples.protocol.stacks import Stack
from examples.protocol.token_loss import WithTokenLogits, token_loss
from examples.protocol.training import check_unfinished, load_pretrained, refuse_other, seed_of, settings, start, train
from kaf_layer import Keypoints

LOSSES = {  # by the weight of the Dice loss
    "ce": 0.0,
    "dice_ce": 1.0,
}
Sample = tuple[Stack, int]  # a slice: the volume, and its number in there; 0 for all of the volume


class Batch(NamedTuple):
    images: Tensor  # B 1 H W, or B 1 D H W
    keypoints: Keypoints
    labels: Tensor  # B H W, or B D H W


def gather(samples: Sequence[Sample], device: torch.device) -> Batch:
    images = torch.stack([stack.images[z] for stack, z in samples])
    labels = torch.stack([stack.labels[z] for stack, z in samples])
    keypoints = Keypoints.stack([stack.keypoints[z] for stack, z in samples])
    return Batch(images.to(device), keypoints.to(device), labels.to(device))


def overlap(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice of all the foreground of a batch, to watch while training."""
    predicted = logits.argmax(1)
    right = (predicted == labels) & (labels > 0)
    return 2 * right.sum() / ((predicted > 0).sum() + (labels > 0).sum()).clamp(min=1)


@torch.no_grad()
def predict(model: nn.Module, stack: Stack, *, batch: int = 8) -> Tensor:
    """The most likely class of each pixel, (Z, H, W), in the volume's size."""
    model.eval()
    device = next(model.parameters()).device
    slices = [(stack, z) for z in range(len(stack.images))]
    batches = [gather(slices[i : i + batch], device) for i in range(0, len(slices), batch)]
    return stack.restore(torch.cat([model(b.images, b.keypoints).argmax(1).cpu() for b in batches]))


def evaluate(model: nn.Module, stacks: Sequence[Stack], *, classes: int) -> list[list[float]]:
    """Dice of each class but the background over each volume, its slices stacked; NaN for a class it does not have."""
    return [scores.dice for scores in score_all(model, stacks, classes=classes)]


def score_all(model: nn.Module, stacks: Sequence[Stack], *, classes: int) -> list[Scores]:
    """Dice and distances of each volume, its slices stacked."""
    pairs = ((predict(model, stack), stack.volume) for stack in tqdm(stacks, desc="test", leave=False))
    return [score(labels, volume.label, classes=classes, spacing=volume.spacing) for labels, volume in pairs]


def versions() -> dict[str, str]:
    others = {name: version(name) for name in ("torch", "monai", "kornia", "accelerate", "numpy")}
    return {"python": platform.python_version(), "kaf-layer": kaf_layer.__version__} | others


def digest(path: Path | None) -> str | None:
    """What tells a file from another, wherever it is."""
    if path and not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path and hashlib.sha256(path.read_bytes()).hexdigest()


def finished(options: argparse.Namespace) -> dict[str, Any] | None:
    """The result of a run with these very options, if there is one.

    Raises:
        ValueError: if --output holds the result of a run with other options.
    """
    path = options.output / "result.json"
    if not path.is_file():
        return None
    result = read_json(path)
    refuse_other(result["settings"], options)
    return result if result["settings"] == settings(options) else None


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--fold", type=int, default=0, help="which of --folds to test on")
    parser.add_argument("--labelled", type=int, default=2, metavar="M", help="subjects to train on")
    parser.add_argument("--pretrained", type=Path, help="weights to start from, as pretrain.py writes them")
    parser.add_argument("--lr", type=float, help="falls to zero along a cosine")
    parser.add_argument("--loss", choices=LOSSES, help="cross-entropy, alone or with the Dice loss")
    parser.add_argument("--epochs", type=int, help="of --steps-per-epoch")
    parser.add_argument("--batch", type=int, help="slices, over all processes")
    return parser


def main(arguments: Sequence[str] | None = None, *, stacks: list[Stack] | None = None) -> dict[str, Any]:
    """Returns what result.json holds; ``stacks`` spares the loading of the data."""
    options = parse(parser(), arguments)
    accelerator = start(options)
    with claimed(options.output) if accelerator.is_main_process else nullcontext():
        return run(options, accelerator, stacks)


def run(options: argparse.Namespace, accelerator: Accelerator, stacks: list[Stack] | None) -> dict[str, Any]:
    stacks = load_stacks(options) if stacks is None else stacks
    split = load_split(options, (stack.volume for stack in stacks))
    if not 0 <= options.fold < len(split):
        raise ValueError(f"--fold must be 0 to {len(split) - 1}, got {options.fold}")
    fold = split[options.fold]
    chosen = fold.labelled(options.labelled)
    options.subjects, options.digest = {"train": chosen, "test": fold.test}, digest(options.pretrained)
    done = finished(options)
    if options.resume and done:
        return done
    if not done:
        check_unfinished(options, accelerator)
    training = [stack for stack in stacks if stack.volume.subject in chosen]
    unseen = [stack for stack in stacks if stack.volume.subject in fold.test]

    torch.manual_seed(seed_of(options.seed))
    model = build_model(options)
    if options.pretrained:
        accelerator.print(load_pretrained(model, options.pretrained))
    learner = WithTokenLogits(model, options.embed_dim, options.classes) if options.token_loss else model
    augment = Augmentation(
        drop_keypoints=options.drop_keypoints, detector=redetector(options), spatial_dims=options.spatial_dims
    )
    criterion = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=LOSSES[options.loss])

    def compute(module: nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
        images, keypoints, labels = augment(*gather(samples, accelerator.device))
        output = module(images, keypoints)
        logits = output.pixels if options.token_loss else output
        values = {"loss": criterion(logits, labels[:, None]), "dice": overlap(logits, labels)}
        if options.token_loss:
            values["tokens"] = token_loss(output.tokens, keypoints, labels)
            values["loss"] = values["loss"] + options.token_loss * values["tokens"]
        return values

    slices = [(stack, z) for stack in training for z in range(len(stack.images))]
    optimizer = torch.optim.Adam(learner.parameters(), lr=options.lr)
    _, history = train(learner, slices, compute, optimizer, accelerator, options)
    result: dict[str, Any] = {}
    if accelerator.is_main_process:
        scores = score_all(model, unseen, classes=options.classes)
        result = {
            "dice": mean_score([row.dice for row in scores]),
            "scores": [[stack.volume.subject, *row.dice] for stack, row in zip(unseen, scores, strict=True)],
            "hd95": [[stack.volume.subject, *row.hd95] for stack, row in zip(unseen, scores, strict=True)],
            "axes": axes_of(stacks[0].volume),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "training_seconds": round(history.seconds, 1),
            "losses": [round(loss, 5) for loss in history.losses],
            "settings": settings(options),
            "versions": versions(),
        }
        save(model.state_dict(), options.output / "weights.pt")
        keep_split(split, options)
        write_json(result, options.output / "result.json")
        trained = f"after {history.seconds:.0f} s of training"
        distance = f"{mean_score([row.hd95 for row in scores]):.1f} mm"
        lost = f", {n} classes missed" if (n := missed([row.hd95 for row in scores])) else ""
        print(f"{options.output}: Dice {result['dice']:.3f}, HD95 {distance}{lost} on {len(unseen)} volumes {trained}")
    accelerator.wait_for_everyone()
    return result


if __name__ == "__main__":
    scripts.run(main)
