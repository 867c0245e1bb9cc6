"""A volume: an image, its labels, and what its file says of its place in the world."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass
class Volume:
    """A stack of slices from base to apex: image (Z, H, W) float32, label (Z, H, W) long.

    Of a file there are also its path, the affine from voxels (x, y, z) to millimetres, and the axes (such as "LPS")
    that the file had before the volume was reoriented, if it was.
    """

    image: Tensor
    label: Tensor
    subject: str
    file: Path | None = None
    affine: Array | None = None
    file_axes: str | None = None

    @property
    def spacing(self) -> tuple[float, ...]:
        """Of the voxels along (Z, H, W), in millimetres; 1 where nothing is known."""
        sides = np.ones(3) if self.affine is None else np.linalg.norm(self.affine[:3, :3], axis=0)
        return tuple(sides[::-1].tolist())
