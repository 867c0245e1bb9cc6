r"""Draws the paper's figures for your own data and networks.

    python -m examples.protocol.figures --output outputs/figures  # on phantoms: all that need no network
    python -m examples.protocol.figures threshold --output outputs/figures  # one of them
    python -m examples.protocol.figures segmentations --table outputs/table --output outputs/figures
    python -m examples.protocol.figures --preset acdc --data ACDC/training --output outputs/figures \
        --runs outputs/table/fold0/unet/seed0/M2 outputs/table/fold0/kaf-unet/seed0/M2

The figures are:
  keypoints        detected, and on a grid
  correspondences  of neighbouring slices, before and after an augmentation
  threshold        matches by their largest distance (Figure 4)
  segmentations    image, reference and all methods side by side, with the Dice of the volume (Figures 2 and 9)
  similarity       of all places to one of them
The last two need networks: those of --runs (outputs of finetune.py), or those of --table (an output of
cross_validate.py), from which --fold, --seed and --labelled choose.
"""

from collections.abc import Sequence

from examples.protocol.options import FigureOptions, console, parse


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(FigureOptions, arguments, __doc__)
    from examples.protocol.drawing.figures import draw_figures  # after parsing, as torch takes seconds to load

    draw_figures(options)


if __name__ == "__main__":
    console.run(main)
