"""Segments the volumes of a folder with a network that finetune.py has trained.

    python -m examples.protocol.predict --weights outputs/M2/weights.pt --output outputs/predicted  # phantoms
    python -m examples.protocol.predict --weights outputs/M2/weights.pt --data FOLDER --output outputs/predicted

For each volume, the command writes the labels as NIfTI with the axes, affine and size of the image, and a picture of
the slice with the largest prediction. It takes any NIfTI files in the folder. Where it finds labels too, it writes Dice
and the 95th percentile of the Hausdorff distance (in mm) to predictions.json and prints their means. The same command
continues a run that was killed.
"""

from collections.abc import Sequence
from typing import Any

from examples.protocol.options import PredictOptions, console, parse


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the content of predictions.json."""
    options = parse(PredictOptions, arguments, __doc__)
    from examples.protocol.experiments.prediction import segment_all  # after parsing, as torch takes seconds to load

    return segment_all(options)


if __name__ == "__main__":
    console.run(main)
