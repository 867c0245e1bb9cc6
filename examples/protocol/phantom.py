"""Draws the phantoms, the data set that all commands use by default.

python -m examples.protocol.phantom  # writes outputs/phantom.png
"""

from pathlib import Path


def main() -> None:
    from examples.protocol.drawing.sheets import plot
    from examples.protocol.volumes.phantom import phantom

    plot([phantom(subject) for subject in range(6)], Path("outputs/phantom.png"))


if __name__ == "__main__":
    main()
