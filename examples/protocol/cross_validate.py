r"""Makes the paper's table: the Dice of networks that are trained on M labelled subjects, on unseen ones, over folds.

    python -m examples.protocol.cross_validate --output outputs/table --methods unet kaf-unet  # on phantoms
    python -m examples.protocol.cross_validate --output outputs/acdc --preset acdc --data ACDC/training \
        --labelled 1 2 6 --methods unet unet-c2 swin-unetr kaf-unet unet+pcl kaf-unet+kaf

A method is a network of finetune.py --model, which starts from random weights. After a "+" it may name a method of
pretrain.py, which pretrains the encoder on all training subjects of the fold: "kaf" (all of Eq. 3), "pcl" (its
positional contrast alone), "simclr", "rotation", "pirl", "glcl-global", "glcl", "caid" or "ssl".

A method may have options of its own, for ablations: --methods kaf-unet "kaf-unet --fusion add --epochs 80". The options
of a pretrained method must be ones that all commands share: "kaf-unet+kaf --depth 2". All other options are passed to
pretrain.py and finetune.py. Options for only one of them go into --pretrain "..." or --finetune "..."; --epochs, --lr,
--batch and --loss are those of fine-tuning.

The same command continues a run that was killed. It writes table.md, results.json, options.json and split.json to
--output. Each method is compared with kaf-unet, or with --reference. The comparison is over the subjects tested, each
the mean of its volumes: it has the mean difference and the p-value of a Wilcoxon signed-rank test. The table includes
published rows: the paper's for its presets, or others from --beside rows.json, which holds
{"UNet, Table 1": {"1": 0.5, "2": 0.6}, ...}
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from examples.protocol.options import console
from examples.protocol.options.table import parse_table

if TYPE_CHECKING:
    from examples.protocol.results.comparison import Result


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Returns the content of results.json."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("cross_validate.py is one process, which trains --jobs folds at a time: start it with python")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    table = parse_table(arguments, __doc__)
    # After parsing, as torch takes seconds to load.
    from examples.protocol.experiments.cross_validation import cross_validate

    return cross_validate(table, arguments)


if __name__ == "__main__":
    console.run(main)
