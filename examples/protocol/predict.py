"""Segments the volumes of a folder by a network that finetune.py trained.

    python -m examples.protocol.predict --weights outputs/M2/weights.pt --output outputs/predicted  # phantoms
    python -m examples.protocol.predict --weights outputs/M2/weights.pt --data FOLDER --output outputs/predicted

For each volume it writes the labels as NIfTI, in the space of the image: the same axes, affine and size; and a picture
of the slice with most of them. Any NIfTI files in the folder are taken. Where data.py finds labels for them, it writes
Dice and the 95th percentile of the Hausdorff distance (mm) to predictions.json and prints their means. What was killed
goes on where it was, by the same command.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from examples.protocol import scripts
from examples.protocol.data import (
    PHANTOMS,
    add_reading_options,
    axes_of,
    check_window,
    list_files,
    load_volume,
    scaled,
    stem,
)
from examples.protocol.detectors import LEARNT, build_detector
from examples.protocol.files import claimed, read_json, write, write_json
from examples.protocol.finetune import digest, predict
from examples.protocol.nifti import STORED, Nifti, reorient, write_nifti
from examples.protocol.phantom import Volume, phantom
from examples.protocol.runs import Run, read_run
from examples.protocol.scores import mean_score, missed, score
from examples.protocol.stacks import prepare
from kaf_layer import KeypointDetector
from kaf_layer.plotting import draw_image, draw_labels


class Source(NamedTuple):
    """Where a volume is, and the name that its prediction gets."""

    name: str
    subject: str
    image: Path | None  # None for the phantom of that name
    label: Path | None  # if there is any


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=scripts.HelpFormatter)
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="weights.pt of finetune.py, result.json beside it")
    add("--data", type=Path, metavar="FOLDER", help="of NIfTI volumes, with or without labels (default: the phantoms)")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for the predictions")
    add("--limit", type=int, help="segment at most so many volumes")
    add("--detector-weights", type=Path, metavar="FILE", help="of a detector that has learnt, as in the training")
    add_reading_options(parser)
    return parser


def sources(data: Path | None, limit: int | None) -> list[Source]:
    """What is to be segmented; files of one name are told apart by their folders."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least one volume, got {limit}")
    if data is None:
        return [Source(f"phantom-{i:03d}", f"phantom-{i:03d}", None, None) for i in range(limit or PHANTOMS)]
    rows = list_files(data, labelled=None)[:limit]
    names = [stem(image) for _, image, _ in rows]
    if len(set(names)) < len(names):
        names = ["_".join([*image.parts[len(data.parts) : -1], stem(image)]) for _, image, _ in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"--data {data} has several images of one name, {Counter(names).most_common(1)[0][0]}")
    return [Source(name, *row) for name, row in zip(names, rows, strict=True)]


def read(source: Source, options: argparse.Namespace, axes: str | None) -> Volume:
    """The volume, normalised as those of the training were; refused if its slices are others."""
    if source.image is None:
        volume = phantom(int(source.name[-3:]))
        if volume.label.max() >= options.classes:
            raise ValueError(
                f"--weights {options.weights} are of {options.classes} classes, phantoms have more: give --data"
            )
        return replace(volume, image=scaled(volume, options.window_level))
    chosen = {"ignore_affine": options.ignore_affine, "orientation": options.orientation, "classes": options.classes}
    volume = load_volume(source.subject, source.image, source.label, **chosen)
    known = not options.ignore_affine and options.orientation != STORED
    if known and axes and axes_of(volume) != axes:
        raise ValueError(
            f"{source.image} has slices of another plane than the training, its axes are {axes_of(volume)} and not "
            f"{axes}: give --orientation {axes} to cut it alike, or --orientation {STORED} to leave it as it is"
        )
    return replace(volume, image=scaled(volume, options.window_level))


def complete(options: argparse.Namespace, run: Run) -> argparse.Namespace:
    """The options of the training, with what was given anew."""
    given = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    chosen = argparse.Namespace(**(vars(run.options) | {"data": None, "limit": None} | given))
    check_window(chosen.window_level)
    if chosen.detector in LEARNT and chosen.detector_weights is None:
        raise ValueError(f"--weights {options.weights} needs --detector-weights, those of --detector {chosen.detector}")
    return chosen


def in_file_space(labels: Tensor, volume: Volume, classes: int) -> Nifti:
    """Labels (Z, H, W) of a volume as an array (x, y, z) whose axes are those of the volume's file."""
    array = labels.numpy().T.astype(np.uint8 if classes <= 256 else np.uint16)
    affine = np.eye(4) if volume.affine is None else volume.affine
    return reorient(Nifti(array, affine), volume.file_axes) if volume.file_axes else Nifti(array, affine)


def draw_overlay(volume: Volume, labels: Tensor, *, labelled: bool) -> Figure:
    """The slice with most of what was found: predicted labels, and the reference if there is one."""
    z = int((labels > 0).sum((1, 2)).argmax()) if labels.any() else len(labels) // 2
    panels = {"image": None, "prediction": labels[z]} | ({"reference": volume.label[z]} if labelled else {})
    height, width = labels.shape[1:]
    figure = Figure(figsize=(2.5 * len(panels), 2.5 * height / width + 0.4), layout="compressed", dpi=200)
    for axis, (title, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        draw_image(axis, volume.image[z])
        axis.set_title(title)
        if shown is not None:
            draw_labels(axis, None, shown, fill=0.3, linewidths=0.7)
    figure.suptitle(f"{volume.subject}, slice {z + 1} of {len(labels)}")
    return figure


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """What was done in --output before; refuses that of other weights."""
    path = options.output / "predictions.json"
    made_by = {name: getattr(options, name) for name in ("ignore_affine", "orientation", "window_level")}
    made_by |= {"weights": digest(options.weights), "detector_weights": digest(options.detector_weights)}
    record = read_json(path) if path.is_file() else {"made_by": made_by, "volumes": {}}
    if different := [name for name, value in made_by.items() if record["made_by"].get(name) != value]:
        options_of = " and ".join(f"--{name.replace('_', '-')}" for name in different)
        raise ValueError(
            f"--output {options.output} holds predictions with other {options_of}: choose another --output"
        )
    return record


def segment(source: Source, run: Run, detector: KeypointDetector, options: argparse.Namespace) -> dict[str, Any]:
    """Writes a volume's prediction and picture; returns what is to be noted: its scores, if it has labels."""
    volume = read(source, options, run.axes)
    shape = {"patch": tuple(options.patch), "resize": options.resize, "by_slice": options.normalise == "slice"}
    unlabelled = replace(volume, label=torch.zeros_like(volume.label))
    (stack,) = prepare([unlabelled], detector, **shape)
    labels = predict(run.model, stack)
    labelled = source.image is None or source.label is not None
    in_space = in_file_space(labels, volume, options.classes)
    write_nifti(in_space, options.output / f"{source.name}.nii.gz", like=source.image)
    with rc_context({"font.size": 7, "axes.titlesize": 7, "figure.titlesize": 8}):
        figure = draw_overlay(volume, labels, labelled=labelled)
        write(options.output / f"{source.name}.png", lambda file: figure.savefig(file, format="png"))
    if not labelled:
        return {"image": digest(source.image)}
    found = score(labels, volume.label, classes=options.classes, spacing=volume.spacing)
    return {"image": digest(source.image), "dice": found.dice, "hd95": found.hd95}


def summary(volumes: Sequence[dict[str, Any]]) -> str:
    """The means over the volumes that have labels."""
    dice, hd95 = ([volume[kind] for volume in volumes if kind in volume] for kind in ("dice", "hd95"))
    if not dice:
        return f"{len(volumes)} volumes"
    lost = f", {n} classes missed" if (n := missed(hd95)) else ""
    return f"{len(volumes)} volumes; Dice {mean_score(dice):.3f}, HD95 {mean_score(hd95):.1f} mm{lost} on {len(dice)}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns what predictions.json holds."""
    options = parser().parse_args(arguments)
    run = read_run(options.weights)
    options = complete(options, run)
    chosen = sources(options.data, options.limit)
    if options.data and options.output.resolve().is_relative_to(options.data.resolve()):
        raise ValueError(f"--output {options.output} must lie outside of --data, else its files are taken for images")
    run.model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    detector = build_detector(options)
    with claimed(options.output):
        record = begin(options)
        for source in tqdm(chosen, desc="volumes"):
            before = record["volumes"].get(source.name)
            if before is None or not (options.output / f"{source.name}.nii.gz").is_file():
                record["volumes"][source.name] = segment(source, run, detector, options)
                write_json(record, options.output / "predictions.json")
            elif before["image"] != digest(source.image):
                raise ValueError(f"--output {options.output} has the prediction of another image {source.name}")
    print(f"{options.output}: {summary([record['volumes'][source.name] for source in chosen])}")
    if seen := {source.subject for source in chosen} & set(options.subjects["train"]):
        print(f"The network was trained on {len(seen)} of these subjects: {', '.join(sorted(seen))}")
    return record


if __name__ == "__main__":
    scripts.run(main)
