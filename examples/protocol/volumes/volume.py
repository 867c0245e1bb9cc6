"""A volume: an image, its labels, and its place in the world."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass
class Volume:
    """A stack of slices from base to apex: image (Z, H, W) float32, label (Z, H, W) long.

    A volume that was read from a file also has its path and the affine from voxels (x, y, z) to millimetres. If it was
    reoriented, it has the axes of the file too, such as "LPS".
    """

    image: Tensor
    label: Tensor
    subject: str
    file: Path | None = None
    affine: Array | None = None
    file_axes: str | None = None

    @property
    def spacing(self) -> tuple[float, ...]:
        """The size of a voxel along (Z, H, W), in millimetres; 1 if it is unknown."""
        sides = np.ones(3) if self.affine is None else np.linalg.norm(self.affine[:3, :3], axis=0)
        return tuple(sides[::-1].tolist())
