"""Pretrains a network's encoder without labels, on the training subjects of a fold (Section 3.2 of the paper).

    python -m examples.protocol.pretrain --output outputs/pretrain                                  # phantoms
    python -m examples.protocol.pretrain --preset acdc --data ACDC/training --fold 0 --output outputs/pretrain
    python -m examples.protocol.pretrain --model unet --method simclr --output outputs/simclr       # another method

The defaults are the paper's: SGD with momentum 0.9 and a learning rate of 0.002, which falls to zero along a cosine;
50 epochs; batches of 32 pairs of neighbouring slices, where each slice has its own augmentation; and weights of 1, 1
and 0.01 for the parts of Eq. 3. A network without KAF layers has no tokens, so it learns by the first part alone, the
positional contrast. The other methods (a file each in methods/) are trained in the same way, on batches of 32 slices.
The command writes weights.pt, a plain state dict of the encoder, for finetune.py --pretrained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.protocol.options import PretrainOptions, console, parse

if TYPE_CHECKING:
    from examples.protocol.volumes.stacks import Stack


def main(arguments: Sequence[str] | None = None, *, stacks: list[Stack] | None = None) -> None:
    """Writes the encoder's weights. Given ``stacks``, it does not load the data."""
    options = parse(PretrainOptions, arguments, __doc__)
    from examples.protocol.experiments.pretraining import pretrain  # after parsing, as torch takes seconds to load

    pretrain(options, stacks)


if __name__ == "__main__":
    console.run(main)
