"""Fine-tuning: trains a network on the slices of a few labelled subjects and tests it on unseen volumes."""

import platform
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from monai.losses import DiceCELoss
from torch import Tensor, nn

import kaf_layer
from examples.protocol.experiments.inference import score_all
from examples.protocol.experiments.inputs import fold_of, keep_split, load_split, load_stacks
from examples.protocol.files import claimed, read_json, save, write_json
from examples.protocol.models.detectors import redetector
from examples.protocol.models.networks import build_model
from examples.protocol.models.token_loss import WithTokenLogits, token_loss
from examples.protocol.options import FinetuneOptions
from examples.protocol.options.choices import LOSSES
from examples.protocol.results.scores import mean_score, missed
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.batches import Batch, collate, slices_of
from examples.protocol.training.checkpoints import (
    History,
    Settings,
    check_unfinished,
    digest,
    load_pretrained,
    refuse_other,
)
from examples.protocol.training.loop import seed_of, settings_of, start, train
from examples.protocol.volumes.loading import axes_of
from examples.protocol.volumes.stacks import Stack
from examples.unet import UNet


def finetune(options: FinetuneOptions, stacks: list[Stack] | None = None) -> dict[str, Any]:
    """Returns the content of result.json.

    Args:
        options: the options of the command line.
        stacks: the slices, if they are already loaded.
    """
    accelerator = start(options)
    with claimed(options.output) if accelerator.is_main_process else nullcontext():
        return run(options, accelerator, stacks)


def run(options: FinetuneOptions, accelerator: Accelerator, stacks: list[Stack] | None) -> dict[str, Any]:
    """Trains, tests and writes. The caller must have claimed the folder."""
    stacks = load_stacks(options) if stacks is None else stacks
    split = load_split(options, (stack.volume for stack in stacks))
    fold = fold_of(split, options.fold)
    chosen = fold.labelled(options.labelled)
    subjects = {"train": chosen, "test": fold.test}
    settings = settings_of(options, accelerator, subjects=subjects, digest=digest(options.pretrained))
    done = finished(options.output, settings)
    if options.resume and done:
        return done
    if not done:
        check_unfinished(options, settings, accelerator.print)

    torch.manual_seed(seed_of(options.seed))
    model = build_model(options)
    if options.pretrained:
        accelerator.print(load_pretrained(model, options.pretrained))
    history = fit(model, [s for s in stacks if s.volume.subject in chosen], accelerator, options, settings)
    result: dict[str, Any] = {}
    if accelerator.is_main_process:
        result = judge(model, [s for s in stacks if s.volume.subject in fold.test], options.classes)
        result |= {
            "axes": axes_of(stacks[0].volume),
            "training_seconds": round(history.seconds, 1),
            "losses": [round(loss, 5) for loss in history.losses],
            "settings": settings,
            "versions": versions(),
        }
        save(model.state_dict(), options.output / "weights.pt")
        keep_split(split, options)
        write_json(result, options.output / "result.json")
        print(f"{options.output}: {summary(result)}")
    accelerator.wait_for_everyone()
    return result


def fit(
    model: nn.Module,
    stacks: Sequence[Stack],
    accelerator: Accelerator,
    options: FinetuneOptions,
    settings: Settings,
) -> History:
    """Trains a network, with the loss on its tokens if the options ask for it."""
    learner = WithTokenLogits(cast("UNet", model), options.embed_dim, options.classes) if options.token_loss else model
    augment = Augmentation(
        drop_keypoints=options.drop_keypoints, detector=redetector(options), spatial_dims=options.spatial_dims
    )
    criterion = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=LOSSES[options.loss])

    def compute(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, keypoints, labels = augment(*batch)
        output = module(images, keypoints)
        logits = output.pixels if options.token_loss else output
        values = {"loss": criterion(logits, labels[:, None]), "dice": overlap(logits, labels)}
        if options.token_loss:
            values["tokens"] = token_loss(output.tokens, keypoints, labels)
            values["loss"] = values["loss"] + options.token_loss * values["tokens"]
        return values

    optimizer = torch.optim.Adam(learner.parameters(), lr=options.lr)
    _, history = train(learner, slices_of(stacks), collate, compute, optimizer, accelerator, options, settings)
    return history


def judge(model: nn.Module, stacks: Sequence[Stack], classes: int) -> dict[str, Any]:
    """The part of the result that is known without the training: scores by volume, and the network's size."""
    scores = score_all(model, stacks, classes=classes)
    return {
        "dice": mean_score([row.dice for row in scores]),
        "scores": [[stack.volume.subject, *row.dice] for stack, row in zip(stacks, scores, strict=True)],
        "hd95": [[stack.volume.subject, *row.hd95] for stack, row in zip(stacks, scores, strict=True)],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def summary(result: dict[str, Any]) -> str:
    """A result in a line."""
    distances = [row[1:] for row in result["hd95"]]
    lost = f", {n} classes missed" if (n := missed(distances)) else ""
    scores = f"Dice {result['dice']:.3f}, HD95 {mean_score(distances):.1f} mm{lost} on {len(distances)} volumes"
    return f"{scores} after {result['training_seconds']:.0f} s of training"


def finished(output: Path, settings: Settings) -> dict[str, Any] | None:
    """The result of a run with the same settings, if there is one.

    Raises:
        ValueError: if --output holds the result of a run with other settings.
    """
    path = output / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = read_json(path)
    refuse_other(result["settings"], settings, output)
    return result if result["settings"] == settings else None


def overlap(logits: Tensor, labels: Tensor) -> Tensor:
    """The Dice of the whole foreground of a batch, to show during training."""
    predicted = logits.argmax(1)
    right = (predicted == labels) & (labels > 0)
    return 2 * right.sum() / ((predicted > 0).sum() + (labels > 0).sum()).clamp(min=1)


def versions() -> dict[str, str]:
    others = {name: version(name) for name in ("torch", "monai", "kornia", "accelerate", "numpy")}
    return {"python": platform.python_version(), "kaf-layer": kaf_layer.__version__} | others
