"""Volumes to train and test on: the phantoms, or NIfTI files from a folder.

python examples/data.py ../shared/data/sunnybrook  # what is in it
"""

import argparse
import csv
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from phantom import Volume, phantom
from torch import Tensor
from tqdm import tqdm

PHANTOMS = 12  # subjects, unless a limit says otherwise


def load_volumes(path: Path | str | None = None, *, limit: int | None = None) -> list[Volume]:
    """All volumes of a data set, each normalised by itself.

    Args:
        path: a folder with a ``manifest.csv`` (columns subject, image, label; the files relative to
            the folder; a subject may have several rows), or with the folders ``images`` and ``labels``,
            or ``imagesTr`` and ``labelsTr``, that hold files of the same names, one for each subject,
            as in the Medical Segmentation Decathlon. NIfTI axes (x, y, z) become (Z, H, W). None gives
            phantoms.
        limit: how many subjects to take, all of them by default.

    Raises:
        FileNotFoundError: if the folder, its lists or one of its files is not there.
        ValueError: if a file cannot be read, is not a finite volume, or a label is not of its image.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least one subject, got {limit=}")
    if path is None:
        subjects = tqdm(range(limit or PHANTOMS), desc="phantoms", leave=False)
        volumes = [phantom(subject) for subject in subjects]
    else:
        rows = list_files(Path(path))
        chosen = list(dict.fromkeys(subject for subject, _, _ in rows))[:limit]
        rows = [row for row in rows if row[0] in chosen]
        volumes = [load_volume(*row) for row in tqdm(rows, desc=f"volumes of {path}", leave=False)]
    return [Volume(normalise(volume.image), volume.label, volume.subject) for volume in volumes]


def list_files(path: Path) -> list[tuple[str, Path, Path]]:
    """The (subject, image, label) of each volume in a folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    manifest = path / "manifest.csv"
    if manifest.is_file():
        with manifest.open(newline="") as file:
            lines = list(csv.DictReader(file))
        if lines and not {"subject", "image", "label"} <= lines[0].keys():
            raise ValueError(f"{manifest} must have the columns subject, image and label, got {[*lines[0]]}")
        rows = [(line["subject"], path / line["image"], path / line["label"]) for line in lines]
    else:
        folder = next((path / name for name in ("images", "imagesTr") if (path / name).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{path} must hold a manifest.csv, or images and labels (or imagesTr, labelsTr)")
        labels = path / folder.name.replace("images", "labels")
        # The Decathlon's archives hold hidden files beside the images.
        images = sorted(folder.glob("[!.]*.nii*"))
        rows = [(image.name.removesuffix(".gz").removesuffix(".nii"), image, labels / image.name) for image in images]
    if not rows:
        raise FileNotFoundError(f"{path} lists no volumes")
    return rows


def load_volume(subject: str, image_path: Path, label_path: Path) -> Volume:
    """One volume as it is stored, its axes in the order (Z, H, W)."""
    image, label = read_nifti(image_path), read_nifti(label_path)
    if image.shape != label.shape:
        raise ValueError(f"{label_path} has the shape {label.shape}, but its image {image_path} has {image.shape}")
    classes = label.astype(np.int64)
    if classes.min() < 0 or (classes != label).any():
        raise ValueError(f"{label_path} must hold whole numbers from 0, got values {np.unique(label)[:5]}")
    return Volume(torch.from_numpy(image), torch.from_numpy(classes), subject)


def read_nifti(path: Path) -> np.ndarray:
    """The (x, y, z) array of a file as (z, y, x) float32."""
    import nibabel  # the phantoms do without

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        array = nibabel.load(path).get_fdata(dtype=np.float32)
    except (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    if array.ndim != 3 or not np.isfinite(array).all():
        raise ValueError(f"{path} must be a volume of three axes and finite values, got {array.shape=}")
    return np.ascontiguousarray(array.T)


def normalise(image: Tensor) -> Tensor:
    """Zero mean and unit variance."""
    return (image - image.mean()) / image.std().clamp(min=1e-6)


def num_classes(volumes: Sequence[Volume]) -> int:
    """The number of classes in the labels, the background included."""
    return 1 + max(int(volume.label.max()) for volume in volumes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a folder of NIfTI files (default: the phantoms)")
    parser.add_argument("--limit", type=int, help="of so many subjects")
    arguments = parser.parse_args()
    volumes = load_volumes(arguments.path, limit=arguments.limit)
    for volume in volumes:
        print(f"{volume.subject:24} {tuple(volume.image.shape)} {volume.label.flatten().bincount().tolist()}")
    print(f"{len(volumes)} volumes, {num_classes(volumes)} classes")
