r"""The paper's table: Dice on unseen subjects, of networks trained on M labelled ones, over folds.

    python -m examples.protocol.cross_validate --output outputs/table --methods unet kaf-unet  # on phantoms
    python -m examples.protocol.cross_validate --output outputs/acdc --preset acdc --data ACDC/training \
        --labelled 1 2 6 --methods unet unet-c2 swin-unetr kaf-unet unet+pcl kaf-unet+kaf

A method is a network of finetune.py --model, trained from random weights; behind a "+" is what its encoder is
pretrained by on all training subjects of the fold, a method of pretrain.py: "kaf", all of Eq. 3, "pcl", its positional
contrast alone, "simclr", "rotation", "pirl", "glcl-global", "glcl", "caid" or "ssl".
Options of its own may follow, for ablations: --methods kaf-unet "kaf-unet --fusion add --epochs 80", those that all
scripts know if it is pretrained: "kaf-unet+kaf --depth 2". Other options go to pretrain.py and finetune.py, those in
--pretrain "..." and --finetune "..." to one of them; --epochs, --lr, --batch and --loss are those of fine-tuning.
What was killed goes on where it was, by the same command. Writes
table.md, results.json, options.json, split.json to --output.
Each method is compared with kaf-unet, or with what --reference says: the mean difference over the
subjects tested, each the mean of its volumes, and the p-value of a Wilcoxon signed-rank test. Published rows stand
beside ours, the paper's for its presets, others by --beside rows.json: {"UNet, Table 1": {"1": 0.5, "2": 0.6}, ...}
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
    """Returns what results.json holds."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("cross_validate.py is one process that trains --jobs folds at a time, start it with python")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    table = parse_table(arguments, __doc__)
    # After parsing, as torch takes seconds to load.
    from examples.protocol.experiments.cross_validation import cross_validate

    return cross_validate(table, arguments)


if __name__ == "__main__":
    console.run(main)
