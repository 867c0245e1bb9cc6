"""Measures what added layers contribute to a network in training: how large their maps are, and what they depend on.

    python -m benchmarks.context.added_maps RUN --data ../shared/data/lumbar

RUN is the folder of a finished or interrupted run of examples/protocol/finetune.py with --fusion add. It must hold
checkpoint.pt. The input is six slices of the run's training subjects, augmented as in training; batch statistics are
those of these slices. If an added map is the same in all images, and as good without the features, it carries only
positions in the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from benchmarks.common import harness
from examples.protocol.experiments.inputs import prepare_volumes, read_volumes
from examples.protocol.files import load
from examples.protocol.models.networks import build_model
from examples.protocol.options import FinetuneOptions, console, read_settings
from examples.protocol.options.choices import LOSSES
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.batches import Batch, gather, slices_of
from kaf_layer import KAFLayer, KAFOutput

SLICES = 6


def added_layers(model: nn.Module) -> list[KAFLayer]:
    return [m for m in model.modules() if isinstance(m, KAFLayer) and m.fusion == "add"]


@contextmanager
def edited(layer: KAFLayer, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces the map that the layer adds by a function of it."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: KAFOutput) -> KAFOutput:
        return KAFOutput(arguments[0] + edit(output.features - arguments[0]), output.tokens)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def blind(layer: KAFLayer) -> Iterator[None]:
    """Gives the layer tokens that contain their positions but no features."""
    handle = layer.embed.register_forward_hook(lambda module, _, output: module.bias.expand_as(output))
    try:
        yield
    finally:
        handle.remove()


def note(seen: dict[str, Tensor], _: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Keeps the features that a layer receives."""
    seen["features"] = arguments[0]


@torch.no_grad()
def measure(model: nn.Module, batch: Batch, criterion: nn.Module) -> Iterator[dict[str, object]]:
    """Yields a row for each added layer."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # leaves the running averages as they are

    def loss() -> float:
        return float(criterion(model(batch.images, batch.keypoints), batch.labels[:, None]))

    before = loss()
    for number, layer in enumerate(added_layers(model), start=1):
        seen: dict[str, Tensor] = {}
        handle = layer.register_forward_pre_hook(partial(note, seen))
        with edited(layer, partial(seen.setdefault, "added")):
            loss()
        handle.remove()
        features, added = seen["features"], seen["added"]
        axes = (0, *range(2, added.ndim))
        shares = added.square().mean(axes) / features.square().mean(axes)
        with edited(layer, torch.zeros_like):
            without = loss()
        with edited(layer, lambda added: added.mean(0, keepdim=True).expand_as(added)):
            same = loss()
        with blind(layer):
            unseeing = loss()
        yield {
            "added layer": number,
            "gain": float(layer.gain.square().mean().sqrt()),
            "added / features": float(added.square().mean().sqrt() / features.square().mean().sqrt()),
            "in the strongest channel": float(shares.max().sqrt()),
            "the same in all images": float(added.mean(0).square().mean() / added.square().mean()),
            "loss": before,
            "loss without it": without,
            "loss if it is the same in all": same,
            "loss if tokens know places only": unseeing,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("run", type=Path, help="folder with checkpoint.pt")
    parser.add_argument("--data", type=Path, help="data that the run was trained on")
    own = parser.parse_args(arguments)
    checkpoint = load(own.run / "checkpoint.pt")
    options = read_settings(FinetuneOptions, checkpoint["settings"], output=own.run, data=own.data)
    model = build_model(options)
    model.load_state_dict(checkpoint["module"])
    if not added_layers(model):
        raise ValueError(f"{own.run} must be a run with --fusion add, got --model {options.model}")
    chosen = checkpoint["settings"]["subjects"]["train"]
    volumes = [volume for volume in read_volumes(options) if volume.subject in chosen]
    samples = slices_of(prepare_volumes(volumes, options))
    torch.manual_seed(0)
    picked = [samples[i] for i in torch.randperm(len(samples))[:SLICES].tolist()]
    batch = Batch(*Augmentation()(*gather(picked, torch.device("cpu"))))
    criterion = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=LOSSES[options.loss])
    steps = options.steps_per_epoch or -(-len(samples) // options.batch)
    notes = (
        f"{options.model}, {options.levels} levels, --position {options.position}, {', '.join(chosen)}; after "
        f"{len(checkpoint['losses']) * steps} steps; {len(picked)} slices. Sizes are root mean squares in training "
        "mode. The share that is the same in all images is that of the added map's power in its mean over the images. "
        "Losses are those of these slices."
    )
    harness.report("added-maps", list(measure(model, batch, criterion)), notes=notes, packages=["monai"])


if __name__ == "__main__":
    console.run(main)
