r"""Trains a network on the slices of a few labelled subjects and tests it on the volumes of unseen ones.

    python -m examples.protocol.finetune --output outputs/finetune --labelled 2                     # phantoms
    python -m examples.protocol.finetune --preset acdc --data ACDC/training --fold 0 --labelled 6 \
        --pretrained outputs/pretrain/weights.pt --output outputs/acdc
    torchrun --nproc-per-node 2 -m examples.protocol.finetune --output outputs/two                  # also on a CPU

The defaults are the paper's: Adam, cross-entropy and batches of 10 slices. --preset sets the learning rate and the
number of epochs. The command writes weights.pt (a plain state dict), result.json, split.json (for --split) and
TensorBoard logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from examples.protocol.options import FinetuneOptions, console, parse

if TYPE_CHECKING:
    from examples.protocol.volumes.stacks import Stack


def main(arguments: Sequence[str] | None = None, *, stacks: list[Stack] | None = None) -> dict[str, Any]:
    """Returns the content of result.json. Given ``stacks``, it does not load the data."""
    options = parse(FinetuneOptions, arguments, __doc__)
    from examples.protocol.experiments.finetuning import finetune  # after parsing, as torch takes seconds to load

    return finetune(options, stacks)


if __name__ == "__main__":
    console.run(main)
