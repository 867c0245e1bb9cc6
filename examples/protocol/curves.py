"""Draws the training loss of each method that cross_validate.py has run, to show whether it has flattened.

python -m examples.protocol.curves outputs/table  # reads results.json there and writes curves.png next to it
"""

from collections.abc import Sequence

from examples.protocol.files import read_json
from examples.protocol.options import CurveOptions, console, parse


def main(arguments: Sequence[str] | None = None) -> None:
    folder = parse(CurveOptions, arguments, __doc__).folder
    from examples.protocol.drawing.curves import draw_curves  # after parsing, as matplotlib is slow to load

    draw_curves(read_json(folder / "results.json")).savefig(folder / "curves.png", dpi=150)
    print(f"wrote {folder / 'curves.png'}")


if __name__ == "__main__":
    console.run(main)
