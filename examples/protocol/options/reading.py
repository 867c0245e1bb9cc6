"""The options of all commands that read volumes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from examples.protocol.options.choices import STORED, axes
from examples.protocol.options.fields import CommandLine, option


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(CommandLine):
    """How volumes are read."""

    title: ClassVar[str] = "options for reading volumes"

    ignore_affine: bool = option(
        "take volumes and labels as they are stored, voxel by voxel", default=False, action="store_true"
    )
    orientation: str | None = option(
        f"turn all volumes to these axes, such as RAS, or leave them as they are {STORED} "
        "(default: mirror them within the plane of their slices)",
        default=None,
        type=axes,
        metavar="AXES",
    )
    window_level: tuple[float, float] | None = option(
        "clip intensities to this window before they are normalised, for CT",
        default=None,
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )

    def check(self) -> None:
        """Refuses a window of intensities whose ends are swapped."""
        check_window(self.window_level)


def check_window(window: Sequence[float] | None) -> None:
    """Refuses a window of intensities whose ends are swapped."""
    if window is not None and not window[0] < window[1]:
        raise ValueError(f"--window-level must be LOW HIGH, the lower end first, got {window[0]:g} {window[1]:g}")
