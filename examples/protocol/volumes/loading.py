"""Volumes to train and test on: the phantoms, or NIfTI files from a folder."""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.protocol.options.choices import STORED
from examples.protocol.options.reading import check_window
from examples.protocol.volumes.nifti import (
    TOLERANCE,
    Nifti,
    codes_of,
    distance,
    in_plane,
    is_usable,
    read_nifti,
    reorient,
)
from examples.protocol.volumes.phantom import phantom
from examples.protocol.volumes.volume import Volume

PHANTOMS = 12  # the number of subjects without a limit
END = r"(?P<end>\.nii(\.gz)?)"
# Patterns of the images' paths below a folder, and the paths of their labels: ACDC's patient001_frame01[_gt].nii.gz,
# CHD's ct_1001_{image,label}.nii.gz, Synapse's img/img0001.nii.gz and label/label0001.nii.gz.
LAYOUTS = (
    (rf"(?P<subject>patient\d+)(?P<frame>_frame\d+){END}", r"\g<subject>\g<frame>_gt\g<end>"),
    (rf"(?P<subject>[^./][^/]*)_image{END}", r"\g<subject>_label\g<end>"),
    (rf"img/(?P<subject>img(?P<number>\d+)){END}", r"label/label\g<number>\g<end>"),
)
Row = tuple[str, Path, Path | None]  # subject, image and label


def load_volumes(
    path: Path | str | None = None,
    *,
    limit: int | None = None,
    classes: int | None = None,
    labelled: bool = True,
    ignore_affine: bool = False,
    orientation: str | None = None,
    window: Sequence[float] | None = None,
) -> list[Volume]:
    """Reads all volumes of a data set and normalises each of them separately.

    Args:
        path: a folder, or None for phantoms. It may have a ``manifest.csv`` (columns subject, image, label; the files
            are relative to the folder; a subject may have several rows). It may have the folders ``images`` and
            ``labels``, or ``imagesTr`` and ``labelsTr``, with files of the same names, one for each subject, as in the
            Medical Segmentation Decathlon. Or it may have files anywhere below it that are named like ACDC's
            (``patient001_frame01.nii.gz`` and ``patient001_frame01_gt.nii.gz``), CHD's (``ct_1001_image.nii.gz`` and
            ``ct_1001_label.nii.gz``) or Synapse's (``img/img0001.nii.gz`` and ``label/label0001.nii.gz``). NIfTI axes
            (x, y, z) become (Z, H, W).
        limit: the largest number of subjects to read, by default all.
        classes: the number of classes, the background included, by default as many as the labels have.
        labelled: if False, no labels are looked for, and all voxels are background.
        ignore_affine: reads volumes and labels as they are stored, voxel by voxel, whatever their affines are.
        orientation: of all volumes, such as "RAS", or "stored" to leave them as they are stored. By default, volumes
            are turned and mirrored within the plane of their slices until they agree.
        window: the lowest and the highest intensity, to which an image is clipped before it is normalised.

    Raises:
        FileNotFoundError: if the folder, its manifest or one of its files does not exist.
        ValueError: if a file cannot be read or is not a finite volume; if a label does not fit its image or the
            classes; if an affine cannot be used; if an image and its label have different affines; or if the slices
            of two volumes lie in different planes.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least one subject, got {limit=}")
    check_window(window)
    if path is None:
        subjects = tqdm(range(limit or PHANTOMS), desc="phantoms", leave=False)
        volumes = [phantom(subject) for subject in subjects]
        if classes is not None and classes < num_classes(volumes):
            raise ValueError(f"phantoms have {num_classes(volumes)} classes, give --data or more, got {classes=}")
    else:
        rows = list_files(Path(path), labelled=labelled)
        chosen = list(dict.fromkeys(subject for subject, _, _ in rows))[:limit]
        rows = [row for row in rows if row[0] in chosen]
        volumes = []
        for subject, image, label in tqdm(rows, desc=f"volumes of {path}", leave=False):
            volume = load_volume(
                subject, image, label, classes=classes, ignore_affine=ignore_affine, orientation=orientation
            )
            volumes.append(volume)
            if orientation is None and not ignore_affine:
                check_planes(volumes[0], volumes[-1])
    return [replace(volume, image=scaled(volume, window)) for volume in volumes]


def list_files(path: Path, *, labelled: bool | None = True) -> list[Row]:
    """The (subject, image, label) of each volume in a folder.

    With ``labelled=False`` all labels are None. With ``labelled=None`` a label that does not exist is None. In both
    cases the folder may hold any NIfTI files; each is then a subject with the name of the file.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"--data: there is no folder {path}")
    folder = next((path / name for name in ("images", "imagesTr") if (path / name).is_dir()), None)
    rows: list[Row]
    if (path / "manifest.csv").is_file():
        rows = list(read_manifest(path / "manifest.csv", labelled=labelled))
    elif folder:
        labels = path / folder.name.replace("images", "labels")
        rows = [(stem(image), image, labels / image.name) for image in nifti_files(folder, "*")]
    else:
        found = nifti_files(path, "**/*")
        rows = [
            (match["subject"], file, Path(str(file)[: -len(match[0])] + match.expand(label)))
            for pattern, label in LAYOUTS
            for file in found
            if (match := re.search(rf"(?<![^/]){pattern}$", file.as_posix()))
        ]
        if not rows and not labelled:
            rows = [(stem(file), file, None) for file in found]
        if not rows:
            raise FileNotFoundError(
                f"--data {path} must hold a manifest.csv, or images and labels (or imagesTr, labelsTr), or files named "
                "patient001_frame01.nii.gz, ct_1001_image.nii.gz or img/img0001.nii.gz"
            )
    if not rows:
        raise FileNotFoundError(f"--data {path} lists no volumes")
    if labelled:
        return rows
    there = [label if labelled is None and label and label.is_file() else None for *_, label in rows]
    return [(subject, image, label) for (subject, image, _), label in zip(rows, there, strict=True)]


def nifti_files(path: Path, pattern: str) -> list[Path]:
    """All NIfTI files of a pattern, except hidden ones, which the archives of the Decathlon contain."""
    return sorted(file for file in path.glob(f"{pattern}.nii*") if not file.name.startswith("."))


def stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")


def read_manifest(path: Path, *, labelled: bool | None) -> Iterator[Row]:
    """The rows of a manifest as spreadsheets save it: with commas, semicolons or tabs, in Unicode or Latin-1."""
    content = path.read_bytes()
    try:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = [name.strip().lower() for name in next(lines, [])]
    columns = ("subject", "image", "label") if labelled else ("subject", "image")
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}, got {names} without {missing[0]}")
    for cells in lines:
        row = {name: cell.strip() for name, cell in zip(names, cells, strict=False)}
        if not any(row.values()):
            continue
        where = f"line {lines.line_num} of {path}"
        if empty := [name for name in columns[:2] if not row.get(name)] or [n for n in columns if n not in row]:
            raise ValueError(
                f"{path} must have the columns {', '.join(columns)}, {where} has no {empty[0]}: {str(cells)[1:-1]}"
            )
        if labelled and not row["label"]:
            raise FileNotFoundError(f"{path.parent / row['image']} has no labels, {where} names none")
        label = path.parent / row["label"] if row.get("label") else None
        yield row["subject"], path.parent / row["image"], label


def load_volume(
    subject: str,
    image_path: Path,
    label_path: Path | None,
    *,
    classes: int | None = None,
    ignore_affine: bool = False,
    orientation: str | None = None,
) -> Volume:
    """Reads one volume, with axes in the order (Z, H, W) and the intensities of the file."""
    if label_path is not None and not label_path.is_file():
        raise FileNotFoundError(f"{image_path} has no labels, there is no file {label_path}")
    image = read_nifti(image_path)
    label = Nifti(np.zeros_like(image.array), image.affine) if label_path is None else read_nifti(label_path)
    if image.array.shape != label.array.shape:
        raise ValueError(
            f"{label_path} has the shape {label.array.T.shape}, but its image {image_path} has {image.array.T.shape}"
        )
    values = label.array.astype(np.int64)
    if values.min() < 0 or (values != label.array).any():
        raise ValueError(f"{label_path} must hold whole numbers from 0, got values {np.unique(label.array)[:5]}")
    if classes is not None and values.max() >= classes:
        raise ValueError(f"{label_path} must hold the labels 0 to {classes - 1} of {classes=}, got {values.max()}")
    if not ignore_affine:
        check_affines(image, label, image_path, label_path or image_path)
    file_axes, label = None, Nifti(values, image.affine)
    if not ignore_affine and orientation != STORED:
        file_axes = codes_of(image.affine)
        image, label = (reorient(each, orientation or in_plane(file_axes)) for each in (image, label))
    pixels, regions = (torch.from_numpy(np.ascontiguousarray(each.array.T)) for each in (image, label))
    affine = image.affine if is_usable(image.affine) else None
    return Volume(pixels, regions, subject, image_path, affine, file_axes)


def check_affines(image: Nifti, label: Nifti, image_path: Path, label_path: Path) -> None:
    """Refuses affines that cannot be used, and an image and a label with different affines."""
    advice = "give --ignore-affine to take volumes and labels as they are stored"
    for nifti, path in ((image, image_path), (label, label_path)):
        if not is_usable(nifti.affine):
            raise ValueError(f"{path} has an affine that cannot be used, {nifti.affine[:3].tolist()}: {advice}")
    if (voxels := distance(image.affine, label.affine, image.array.shape)) > TOLERANCE:
        axes = " and ".join(codes_of(nifti.affine) for nifti in (image, label))
        raise ValueError(
            f"the affines of {image_path} and {label_path} differ by {voxels:.3g} voxels, their axes are {axes}: "
            f"correct one of them, or {advice}"
        )


def check_planes(first: Volume, other: Volume) -> None:
    """Refuses volumes whose slices lie in different planes."""
    planes = [axes_of(volume) for volume in (first, other)]
    if None not in planes and planes[0] != planes[1]:
        raise ValueError(
            f"the slices of {first.file} and {other.file} lie in different planes, their axes are {planes[0]} and "
            f"{planes[1]}: give --orientation {planes[0]} to cut all alike, or --orientation {STORED} to leave them"
        )


def axes_of(volume: Volume) -> str | None:
    """The directions of a volume's axes (x, y, z), such as "RAS", or None if they are unknown."""
    return None if volume.affine is None else codes_of(volume.affine)


def scaled(volume: Volume, window: Sequence[float] | None) -> Tensor:
    """The image of a volume, clipped to a window and normalised."""
    image = volume.image if window is None else volume.image.clamp(*window)
    name = volume.file or volume.subject
    if window is not None and image.min() == image.max():
        low, high = volume.image.aminmax()
        raise ValueError(
            f"{name} is flat within --window-level {window[0]:g} {window[1]:g}, it holds {low:g} to {high:g}"
        )
    image = normalise(image)
    if not image.isfinite().all():
        raise ValueError(f"{name} holds numbers too large to be normalised as float32, give --window-level LOW HIGH")
    return image


def normalise(image: Tensor) -> Tensor:
    """Shifts and scales an image to zero mean and unit variance."""
    return (image - image.mean()) / image.std().clamp(min=1e-6)


def num_classes(volumes: Sequence[Volume]) -> int:
    """The number of classes in the labels, the background included."""
    return 1 + max(int(volume.label.max()) for volume in volumes)
