"""Draws what flops.py and memory.py counted as attention.png.

python -m benchmarks.cost.figure [--publish]

The two commands also draw it themselves.
"""

from benchmarks.common.harness import parser
from benchmarks.cost.drawing import draw


def main() -> None:
    parser(__doc__).parse_args()
    draw()


if __name__ == "__main__":
    main()
