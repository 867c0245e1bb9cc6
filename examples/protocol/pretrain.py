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

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.protocol.options import PretrainOptions, console, parse

if TYPE_CHECKING:
    from examples.protocol.volumes.stacks import Stack


def main(arguments: Sequence[str] | None = None, *, stacks: list[Stack] | None = None) -> None:
    """``stacks`` saves loading the data."""
    options = parse(PretrainOptions, arguments, __doc__)
    from examples.protocol.experiments.pretraining import pretrain  # after parsing, as torch takes seconds to load

    pretrain(options, stacks)


if __name__ == "__main__":
    console.run(main)
