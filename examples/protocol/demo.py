"""Trains a UNet and a KAF-UNet for the same number of steps on a task that needs context, and compares them.

    python -m examples.protocol.demo                                   # synthetic volumes, about 4 minutes on 2 cores
    python -m examples.protocol.demo --data ../shared/data/sunnybrook  # any folder of NIfTI files

The synthetic volumes show two organs that look alike. Only a third organ, which lies beyond the UNet's receptive field,
determines which is which. The command prints a table of Dice scores on unseen subjects and writes outputs/demo.png.
"""

from collections.abc import Sequence

from examples.protocol.options import DemoOptions, console, parse


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(DemoOptions, arguments, __doc__)
    from examples.protocol.experiments.demonstration import demonstrate  # after parsing, as torch is slow to load

    demonstrate(options)


if __name__ == "__main__":
    console.run(main)
