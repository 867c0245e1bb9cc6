"""Segments the volumes of a folder by a network that finetune.py trained.

    python -m examples.protocol.predict --weights outputs/M2/weights.pt --output outputs/predicted  # phantoms
    python -m examples.protocol.predict --weights outputs/M2/weights.pt --data FOLDER --output outputs/predicted

For each volume it writes the labels as NIfTI, in the space of the image: the same axes, affine and size; and a picture
of the slice with most of them. Any NIfTI files in the folder are taken. Where data.py finds labels for them, it writes
Dice and the 95th percentile of the Hausdorff distance (mm) to predictions.json and prints their means. What was killed
goes on where it was, by the same command.
"""

from collections.abc import Sequence
from typing import Any

from examples.protocol.options import PredictOptions, console, parse


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what predictions.json holds."""
    options = parse(PredictOptions, arguments, __doc__)
    from examples.protocol.experiments.prediction import segment_all  # after parsing, as torch takes seconds to load

    return segment_all(options)


if __name__ == "__main__":
    console.run(main)
