"""Pretrains a network's encoder without labels, on the training subjects of a fold (Section 3.2 of the paper).

    python -m examples.protocol.pretrain --output outputs/pretrain                                  # phantoms
    python -m examples.protocol.pretrain --preset acdc --data ACDC/training --fold 0 --output outputs/pretrain
    python -m examples.protocol.pretrain --model unet --method simclr --output outputs/simclr       # another method

The defaults are the paper's: SGD at 0.002 with momentum 0.9, falling to zero along a cosine; 50 epochs in batches of
32 pairs of neighbouring slices, each slice augmented in its own way; weights 1, 1 and 0.01 of the parts of Eq. 3.
A network without KAF layers has no tokens, and learns by the first part alone, the positional contrast. The other
methods (the files of methods/) are trained alike, a batch being 32 slices.
Writes weights.pt, a plain state dict of the encoder, for finetune.py --pretrained.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from examples.protocol import scripts
from examples.protocol.augmentation import Augmentation
from examples.protocol.files import claimed, load, save
from examples.protocol.methods import METHODS
from examples.protocol.networks import build_model, weights_of
from examples.protocol.recipes import keep_split, load_split, load_stacks, parse, parser_of
from examples.protocol.stacks import Stack
from examples.protocol.training import check_unfinished, refuse_other, seed_of, start, train

OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam}


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--method", choices=METHODS, default="kaf", help="what the encoder learns by")
    parser.add_argument("--fold", type=int, default=0, help="which of --folds to leave out, for tests")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="sgd is the paper's")
    parser.add_argument("--lr", type=float, default=0.002, help="falls to zero along a cosine")
    parser.add_argument("--epochs", type=int, default=50, help="of --steps-per-epoch")
    parser.add_argument("--batch", type=int, default=32, help="pairs of slices, or slices, over all processes")
    parser.add_argument("--weights", type=float, nargs=3, default=[1.0, 1.0, 0.01], help="of the parts of Eq. 3")
    parser.add_argument("--temperature", type=float, help="of a contrast (default: the method's own)")
    parser.add_argument("--threshold", type=float, help="between relative positions, below which slices are alike")
    parser.add_argument("--max-distance", type=float, default=30.0, help="pixels between matching keypoints")
    return parser


def parse_pretraining(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with what the method decides."""
    options = parse(parser(), arguments)
    if options.spatial_dims == 3:
        raise ValueError("pretraining learns from slices, got --spatial-dims 3")
    method = METHODS[options.method]
    options.weights = list(method.weights or options.weights)
    options.temperature = method.temperature if options.temperature is None else options.temperature
    return options


def main(arguments: Sequence[str] | None = None, *, stacks: list[Stack] | None = None) -> None:
    """``stacks`` spares the loading of the data."""
    options = parse_pretraining(arguments)
    # An encoder's last block is not trained by the parts on keypoints alone.
    unused = DistributedDataParallelKwargs(find_unused_parameters=not options.weights[0])
    accelerator = start(options, kwargs_handlers=[unused])
    with claimed(options.output) if accelerator.is_main_process else nullcontext():
        run(options, accelerator, stacks)


def run(options: argparse.Namespace, accelerator: Accelerator, stacks: list[Stack] | None) -> None:
    stacks = load_stacks(options, labelled=False) if stacks is None else stacks
    split = load_split(options, (stack.volume for stack in stacks))
    if not 0 <= options.fold < len(split):
        raise ValueError(f"--fold must be 0 to {len(split) - 1}, got {options.fold}")
    options.subjects = chosen = split[options.fold].train
    if (options.output / "weights.pt").is_file():
        refuse_other(load(options.output / "checkpoint.pt")["settings"], options)
    else:
        check_unfinished(options, accelerator)
    training = [stack for stack in stacks if stack.volume.subject in chosen]
    samples = METHODS[options.method].samples(training, options)

    torch.manual_seed(seed_of(options.seed))
    network = build_model(options)
    method = METHODS[options.method](network, samples, options)
    augment = Augmentation(drop_keypoints=options.drop_keypoints)  # a grid's are moved too: the matches are theirs

    def compute(module: nn.Module, samples: list[Any]) -> dict[str, Tensor]:
        return module(*method.draw(samples, augment, accelerator.device))

    optimizer = OPTIMIZERS[options.optimizer](method.parameters(), lr=options.lr)
    train(method, samples, compute, optimizer, accelerator, options)
    if accelerator.is_main_process:
        save(weights_of(network, method.parts()), options.output / "weights.pt")
        keep_split(split, options)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    scripts.run(main)
