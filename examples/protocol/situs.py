"""Draws the volumes of the demo, in which context matters.

python -m examples.protocol.situs  # writes outputs/situs.png
"""

from pathlib import Path


def main() -> None:
    from examples.protocol.drawing.sheets import plot
    from examples.protocol.volumes.situs import situs

    plot([situs(subject) for subject in range(6)], Path("outputs/situs.png"))


if __name__ == "__main__":
    main()
