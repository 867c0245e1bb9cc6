"""Pretraining: trains a network's encoder without labels, on the training subjects of a fold."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from examples.protocol.experiments.inputs import fold_of, keep_split, load_split, load_stacks
from examples.protocol.files import claimed, load, save
from examples.protocol.methods import METHODS
from examples.protocol.models.networks import build_model, weights_of
from examples.protocol.options import PretrainOptions
from examples.protocol.training.augmentation import Augmentation
from examples.protocol.training.checkpoints import check_unfinished, refuse_other
from examples.protocol.training.loop import seed_of, settings_of, start, train
from examples.protocol.volumes.stacks import Stack

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}


def pretrain(options: PretrainOptions, stacks: list[Stack] | None = None) -> None:
    """Writes the encoder's weights.

    Args:
        options: the options of the command line.
        stacks: the slices, if they are already loaded.
    """
    # The parts of the loss on keypoints alone do not train the encoder's last block.
    unused = DistributedDataParallelKwargs(find_unused_parameters=not options.weights[0])
    accelerator = start(options, kwargs_handlers=[unused])
    with claimed(options.output) if accelerator.is_main_process else nullcontext():
        run(options, accelerator, stacks)


def run(options: PretrainOptions, accelerator: Accelerator, stacks: list[Stack] | None) -> None:
    """Trains and writes. The caller must have claimed the folder."""
    stacks = load_stacks(options, labelled=False) if stacks is None else stacks
    split = load_split(options, (stack.volume for stack in stacks))
    chosen = fold_of(split, options.fold).train
    settings = settings_of(options, accelerator, subjects=chosen)
    if (options.output / "weights.pt").is_file():
        refuse_other(load(options.output / "checkpoint.pt")["settings"], settings, options.output)
    else:
        check_unfinished(options, settings, accelerator.print)
    training = [stack for stack in stacks if stack.volume.subject in chosen]
    samples = METHODS[options.method].samples(training, options)

    torch.manual_seed(seed_of(options.seed))
    network = build_model(options)
    method = METHODS[options.method](network, samples, options)
    # Keypoints of a grid are moved too, not detected again, since they have matches.
    augment = Augmentation(drop_keypoints=options.drop_keypoints)

    def compute(module: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        return module(*method.draw(batch, augment))

    optimizer = OPTIMIZERS[options.optimizer](method.parameters(), lr=options.lr)
    train(method, samples, method.batch_of, compute, optimizer, accelerator, options, settings)
    if accelerator.is_main_process:
        save(weights_of(network, method.parts()), options.output / "weights.pt")
        keep_split(split, options)
    accelerator.wait_for_everyone()
