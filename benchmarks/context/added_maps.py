"""What added layers put into a network in training: how large their maps are, and what they know.

    python -m benchmarks.context.added_maps RUN --data ../shared/data/lumbar

RUN is a folder of examples/protocol/finetune.py, or of a training that was killed: it needs checkpoint.pt, with
--fusion add. Takes six slices of the subjects that it was trained on, moved as in training, with the statistics of that
batch. An added map that is the same in all images, and as good without the features, tells only places in the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from benchmarks.common import harness
from examples.protocol.experiments.inputs import prepare_volumes, read_volumes
from examples.protocol.files import load
from examples.protocol.models.networks import build_model
from examples.protocol.options import FinetuneOptions, read_settings
from examples.protocol.options.choices import LOSSES
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.batches import Batch, gather, slices_of
from kaf_layer import KAFLayer, KAFOutput

SLICES = 6


def added_layers(model: nn.Module) -> list[KAFLayer]:
    return [m for m in model.modules() if isinstance(m, KAFLayer) and m.fusion == "add"]


@contextmanager
def edited(layer: KAFLayer, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The layer with another map added, made of its own."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: KAFOutput) -> KAFOutput:
        return KAFOutput(arguments[0] + edit(output.features - arguments[0]), output.tokens)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def blind(layer: KAFLayer) -> Iterator[None]:
    """The layer with tokens that know where they are, and nothing of the features."""
    handle = layer.embed.register_forward_hook(lambda module, _, output: module.bias.expand_as(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def measure(model: nn.Module, batch: Batch, criterion: nn.Module) -> Iterator[dict[str, object]]:
    """A row for each added layer."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # the running averages stay as they are

    def loss() -> float:
        return float(criterion(model(batch.images, batch.keypoints), batch.labels[:, None]))

    before = loss()
    for number, layer in enumerate(added_layers(model), start=1):
        seen: dict[str, Tensor] = {}
        handle = layer.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.update(features=arguments[0]))
        with edited(layer, lambda added, seen=seen: seen.setdefault("added", added)):
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
    parser.add_argument("run", type=Path, help="a folder with checkpoint.pt")
    parser.add_argument("--data", type=Path, help="that the run was trained on")
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
        f"{len(checkpoint['losses']) * steps} steps; {len(picked)} slices. Sizes are root mean squares, in training; "
        "the share of the added map's power that its mean over the images has; losses of these slices."
    )
    harness.report("added-maps", list(measure(model, batch, criterion)), notes=notes, packages=["monai"])


if __name__ == "__main__":
    main()
