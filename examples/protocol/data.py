"""Volumes to train and test on: the phantoms, or NIfTI files from a folder.

python -m examples.protocol.data ../shared/data/sunnybrook  # what is in it
"""

import argparse
import csv
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.protocol.phantom import Volume, phantom

PHANTOMS = 12  # subjects, unless a limit says otherwise
# Subject, image and label by file name: ACDC's patient001_frame01[_gt].nii.gz, CHD's ct_1001_{image,label}.nii.gz.
LAYOUTS = (
    (re.compile(r"(patient\d+)_frame\d+(?P<mark>)(?P<end>\.nii(\.gz)?)"), "_gt"),
    (re.compile(r"([^.].*)(?P<mark>_image)(?P<end>\.nii(\.gz)?)"), "_label"),
)


def load_volumes(
    path: Path | str | None = None, *, limit: int | None = None, classes: int | None = None, labelled: bool = True
) -> list[Volume]:
    """All volumes of a data set, each normalised by itself.

    Args:
        path: a folder with a ``manifest.csv`` (columns subject, image, label; the files relative to
            the folder; a subject may have several rows); or with the folders ``images`` and ``labels``,
            or ``imagesTr`` and ``labelsTr``, that hold files of the same names, one for each subject,
            as in the Medical Segmentation Decathlon; or with files anywhere below it that are named as ACDC's,
            ``patient001_frame01.nii.gz`` and ``patient001_frame01_gt.nii.gz``, or as CHD's,
            ``ct_1001_image.nii.gz`` and ``ct_1001_label.nii.gz``. NIfTI axes (x, y, z) become (Z, H, W).
            None gives phantoms.
        limit: how many subjects to take at most, all of them by default.
        classes: how many there are, the background included; by default whatever the labels say.
        labelled: False looks for no labels, and gives background.

    Raises:
        FileNotFoundError: if the folder, its lists or one of its files is not there.
        ValueError: if a file cannot be read, is not a finite volume, or a label is not of its image or not of the
            classes.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least one subject, got {limit=}")
    if path is None:
        subjects = tqdm(range(limit or PHANTOMS), desc="phantoms", leave=False)
        volumes = [phantom(subject) for subject in subjects]
        if classes is not None and classes < num_classes(volumes):
            raise ValueError(f"phantoms have {num_classes(volumes)} classes, give --data or more, got {classes=}")
    else:
        rows = list_files(Path(path))
        chosen = list(dict.fromkeys(subject for subject, _, _ in rows))[:limit]
        rows = [row for row in rows if row[0] in chosen]
        volumes = [
            load_volume(subject, image, label if labelled else None, classes=classes)
            for subject, image, label in tqdm(rows, desc=f"volumes of {path}", leave=False)
        ]
    return [replace(volume, image=normalise(volume.image)) for volume in volumes]


def list_files(path: Path) -> list[tuple[str, Path, Path]]:
    """The (subject, image, label) of each volume in a folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    manifest = path / "manifest.csv"
    folder = next((path / name for name in ("images", "imagesTr") if (path / name).is_dir()), None)
    if manifest.is_file():
        with manifest.open(newline="") as file:
            lines = list(csv.DictReader(file))
        columns = ("subject", "image", "label")
        if wrong := [line for line in lines if any(line.get(name) is None for name in columns)]:
            raise ValueError(f"{manifest} must have the columns subject, image and label, got {wrong[0]}")
        rows = [(line["subject"], path / line["image"], path / line["label"]) for line in lines]
    elif folder:
        labels = path / folder.name.replace("images", "labels")
        # The Decathlon's archives hold hidden files beside the images.
        images = sorted(folder.glob("[!.]*.nii*"))
        rows = [(image.name.removesuffix(".gz").removesuffix(".nii"), image, labels / image.name) for image in images]
    else:
        rows = [
            (match[1], file, file.with_name(file.name[: match.start("mark")] + mark + match["end"]))
            for pattern, mark in LAYOUTS
            for file in sorted(path.rglob("*.nii*"))
            if (match := pattern.fullmatch(file.name))
        ]
        if not rows:
            raise FileNotFoundError(
                f"{path} must hold a manifest.csv, or images and labels (or imagesTr, labelsTr), "
                "or files named patient001_frame01.nii.gz or ct_1001_image.nii.gz"
            )
    if not rows:
        raise FileNotFoundError(f"{path} lists no volumes")
    return rows


def load_volume(subject: str, image_path: Path, label_path: Path | None, *, classes: int | None = None) -> Volume:
    """One volume as it is stored, its axes in the order (Z, H, W)."""
    if label_path is not None and not label_path.is_file():
        raise FileNotFoundError(f"{image_path} has no labels, there is no file {label_path}")
    image = read_nifti(image_path)
    label = np.zeros_like(image) if label_path is None else read_nifti(label_path)
    if image.shape != label.shape:
        raise ValueError(f"{label_path} has the shape {label.shape}, but its image {image_path} has {image.shape}")
    values = label.astype(np.int64)
    if values.min() < 0 or (values != label).any():
        raise ValueError(f"{label_path} must hold whole numbers from 0, got values {np.unique(label)[:5]}")
    if classes is not None and values.max() >= classes:
        raise ValueError(f"{label_path} must hold the labels 0 to {classes - 1} of {classes=}, got {values.max()}")
    return Volume(torch.from_numpy(image), torch.from_numpy(values), subject, image_path)


def read_nifti(path: Path) -> np.ndarray:
    """The (x, y, z) array of a file as (z, y, x) float32."""
    # The phantoms do without.
    from monai.data import NibabelReader
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        reader = NibabelReader()
        array, _ = reader.get_data(reader.read(path))
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    if array.ndim != 3 or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"{path} must be a volume of three axes and finite numbers, got {array.shape=} {array.dtype=}")
    return np.ascontiguousarray(array.T, dtype=np.float32)


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
