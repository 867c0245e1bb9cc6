"""Pretrains a network's encoder without labels, on the training subjects of a fold (Section 3.2 of the paper).

    python -m examples.protocol.pretrain --output outputs/pretrain                                  # phantoms
    python -m examples.protocol.pretrain --preset acdc --data ACDC/training --fold 0 --output outputs/pretrain
    python -m examples.protocol.pretrain --model unet --output outputs/pcl                          # PCL alone

The defaults are the paper's: SGD at 0.002 with momentum 0.9, falling to zero along a cosine; 50 epochs in batches of
32 pairs of neighbouring slices, each slice augmented in its own way; weights 1, 1 and 0.01 of the parts of Eq. 3.
A network without KAF layers has no tokens, and learns by the first part alone, the positional contrast.
Writes weights.pt, a plain state dict of the encoder, for finetune.py --pretrained.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from examples.protocol.files import save
from examples.protocol.finetune import gather
from examples.protocol.recipes import build_model, keep_split, load_split, load_stacks, parse, parser_of
from examples.protocol.stacks import Stack, match_slices, say, stack_matches
from examples.protocol.training import Augmentation, seed_of, start, train
from kaf_layer import KAFEncoder, KAFPretrainingLoss, Keypoints, Matches, PretrainingLosses

Pair = tuple[Stack, int, int, Matches]  # two slices of a volume, and the partners of their keypoints


class Pretraining(nn.Module):
    """An encoder and the loss with its heads, in one module, as distributed training asks."""

    def __init__(self, encoder: KAFEncoder, loss: KAFPretrainingLoss) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = loss

    def forward(self, images: Tensor, keypoints: Keypoints, positions: Tensor, matches: Matches) -> PretrainingLosses:
        features, tokens = self.encoder(images, keypoints)
        return self.loss(features[-1], positions, tokens, keypoints, matches)


def neighbours(stacks: Sequence[Stack]) -> list[Pair]:
    """Each slice with the next; the only slice of a volume with itself."""
    pairs = []
    for stack in tqdm(stacks, desc="matches", leave=False):
        if len(stack.images) == 1:
            say(stack, "a slice without a neighbour is paired with itself")
        for z in range(max(1, len(stack.images) - 1)):
            following = min(z + 1, len(stack.images) - 1)
            pairs.append((stack, z, following, match_slices(stack.keypoints[z], stack.keypoints[following])))
    return pairs


def build_loss(encoder: KAFEncoder, options: argparse.Namespace) -> KAFPretrainingLoss:
    """The loss for an encoder, whose last map's channels are those of its last convolution."""
    channels = [m.out_channels for m in encoder.stages[-1].modules() if isinstance(m, nn.Conv2d)][-1]
    tokens = options.embed_dim * len(encoder.layers) if options.model.startswith("kaf") else 0
    return KAFPretrainingLoss(
        channels,
        tokens,
        embed_dim=options.embed_dim,
        weights=tuple(options.weights) if tokens else (1.0, 0.0, 0.0),
        temperature=options.temperature,
        threshold=options.threshold,
        gather_distributed=True,
    )


def parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--fold", type=int, default=0, help="which of --folds to leave out, for tests")
    parser.add_argument("--lr", type=float, default=0.002, help="falls to zero along a cosine")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32, help="pairs of slices, over all processes")
    parser.add_argument("--weights", type=float, nargs=3, default=[1.0, 1.0, 0.01], help="of the parts of the loss")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--threshold", type=float, help="between relative positions, below which slices are alike")
    return parser


def main(arguments: Sequence[str] | None = None, *, stacks: list[Stack] | None = None) -> None:
    """``stacks`` spares the loading of the data."""
    options = parse(parser(), arguments)
    if options.model == "swin-unetr":
        raise ValueError("pretraining takes a network with a KAFEncoder, got --model swin-unetr")
    # An encoder's last block is not trained by the parts on keypoints alone.
    unused = DistributedDataParallelKwargs(find_unused_parameters=not options.weights[0])
    accelerator = start(options, kwargs_handlers=[unused])
    stacks = load_stacks(options, labelled=False) if stacks is None else stacks
    split = load_split(options, (stack.volume for stack in stacks))
    if not 0 <= options.fold < len(split):
        raise ValueError(f"--fold must be 0 to {len(split) - 1}, got {options.fold}")
    options.subjects = chosen = split[options.fold].train
    pairs = neighbours([stack for stack in stacks if stack.volume.subject in chosen])

    torch.manual_seed(seed_of(options.seed))
    encoder: Any = build_model(options).encoder
    module = Pretraining(encoder, build_loss(encoder, options))
    augment = Augmentation(drop_keypoints=options.drop_keypoints)  # a grid's are moved too: the matches are theirs

    def compute(module: nn.Module, samples: list[Pair]) -> dict[str, Tensor]:
        slices = [(stack, a) for stack, a, _, _ in samples] + [(stack, b) for stack, _, b, _ in samples]
        images, keypoints, _ = gather(slices, accelerator.device)
        positions = torch.stack([stack.positions[z] for stack, z in slices]).to(accelerator.device)
        images, keypoints, _ = augment(images, keypoints)
        half, slots = len(samples), keypoints.valid.shape[1]
        matches = stack_matches([m for *_, m in samples], slots).to(accelerator.device)
        losses = module(images, keypoints, positions, matches.among(keypoints[:half], keypoints[half:]))
        return {"loss": losses.total, **dict(zip(losses._fields[1:], losses[1:], strict=True))}

    optimizer = torch.optim.SGD(module.parameters(), lr=options.lr, momentum=0.9)
    train(module, pairs, compute, optimizer, accelerator, options)
    if accelerator.is_main_process:
        weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
        save(weights, options.output / "weights.pt")
        keep_split(split, options)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
