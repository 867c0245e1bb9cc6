"""NIfTI files: reading, writing, and turning volumes to one orientation and back to that of their file.

Axes are named as in nibabel: "RAS" means that the first axis points to the patient's right, the second to the front and
the third to the head.
"""

import gzip
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.protocol.files import write
from examples.protocol.options.choices import DIRECTIONS

TOLERANCE = 0.1  # voxels by which the affines of an image and its label may differ, as headers are rounded


class Nifti(NamedTuple):
    """An array (x, y, z) and the affine (4, 4) from its voxels to millimetres."""

    array: np.ndarray
    affine: np.ndarray


def read_nifti(path: Path) -> Nifti:
    """Reads the array of a file, as float32, and its affine, as they are stored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, does not have three axes, or holds numbers that are not finite as float32.
    """
    import nibabel  # which phantoms do not need
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        image: Any = nibabel.load(path)  # its types know no arrays
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise ValueError(f"{path} must be a volume of three axes and numbers, got {array.shape=} {array.dtype=}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{path} must hold finite numbers of float32, got NaN, infinity or numbers beyond 3.4e38")
    return Nifti(array, np.asarray(image.affine, dtype=np.float64))


def write_nifti(volume: Nifti, path: Path, *, like: Path | None = None) -> None:
    """Writes an array (x, y, z) to a compressed file.

    The affines, codes and units are those of the file ``like``. Without such a file, the array's own affine is written.
    """
    import nibabel

    model: Any = nibabel.Nifti1Image(*volume) if like is None else nibabel.load(like)
    header = model.header.copy()
    header.set_data_dtype(volume.array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0  # the range of grey values to show
    content = type(model)(volume.array, None, header).to_bytes()
    write(path, lambda temporary: temporary.write_bytes(gzip.compress(content, mtime=0)))


def is_usable(affine: np.ndarray) -> bool:
    """Whether an affine gives each voxel its own place: it is finite and has full rank."""
    return bool(np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3)


def distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest difference of a volume's corners under two affines, along one axis, in voxels of the first."""
    corners = np.array([[*np.where(bits, np.array(shape) - 1, 0), 1] for bits in np.ndindex(2, 2, 2)], dtype=float)
    return float(np.abs(np.linalg.solve(one, other @ corners.T).T - corners)[:, :3].max())


def codes_of(affine: np.ndarray) -> str:
    """The directions of the axes, such as "RAS" or "LPS"."""
    import nibabel

    return "".join(nibabel.aff2axcodes(affine, DIRECTIONS))


def in_plane(codes: str) -> str:
    """The orientation that mirror images of a slice have in common: RAS, ASR or RSA.

    The third axis, across the slices, remains the third. All axes point to the right, the front or the head, and the
    two within a slice are in this order.
    """
    positive = ["RAS"[[code in pair for pair in DIRECTIONS].index(True)] for code in codes]
    return "".join(sorted(positive[:2], key="RAS".index)) + positive[2]


def reorient(volume: Nifti, codes: str) -> Nifti:
    """Turns and mirrors an array until its axes have these directions. Each voxel keeps its place in the world."""
    if codes_of(volume.affine) == codes:
        return volume
    from monai.data import MetaTensor
    from monai.transforms import Orientation

    turned = Orientation(codes, labels=DIRECTIONS)(MetaTensor(volume.array[None], affine=volume.affine))
    return Nifti(np.ascontiguousarray(turned[0].numpy()), turned.affine.numpy())
