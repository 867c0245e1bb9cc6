"""Prediction: segments the volumes of a folder with a fine-tuned network."""

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

from examples.protocol.experiments.inference import predict
from examples.protocol.experiments.runs import Run, read_run
from examples.protocol.files import claimed, read_json, write, write_json
from examples.protocol.models.detectors import build_detector
from examples.protocol.options import PredictOptions, changed
from examples.protocol.options.choices import LEARNT, STORED
from examples.protocol.options.reading import check_window
from examples.protocol.results.scores import mean_score, missed, score
from examples.protocol.training.checkpoints import digest
from examples.protocol.volumes.loading import PHANTOMS, axes_of, list_files, load_volume, scaled, stem
from examples.protocol.volumes.nifti import Nifti, reorient, write_nifti
from examples.protocol.volumes.phantom import phantom
from examples.protocol.volumes.stacks import prepare
from examples.protocol.volumes.volume import Volume
from kaf_layer import KeypointDetector
from kaf_layer.plotting import draw_image, draw_labels


class Source(NamedTuple):
    """The files of a volume and the name of its prediction."""

    name: str
    subject: str
    image: Path | None  # None for the phantom of that name
    label: Path | None  # if there is any


def sources(data: Path | None, limit: int | None) -> list[Source]:
    """The volumes to segment. Files with the same name get the names of their folders too."""
    if data is None:
        return [Source(f"phantom-{i:03d}", f"phantom-{i:03d}", None, None) for i in range(limit or PHANTOMS)]
    rows = list_files(data, labelled=None)[:limit]
    names = [stem(image) for _, image, _ in rows]
    if len(set(names)) < len(names):
        names = ["_".join([*image.parts[len(data.parts) : -1], stem(image)]) for _, image, _ in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"--data {data} has several images of one name, {Counter(names).most_common(1)[0][0]}")
    return [Source(name, *row) for name, row in zip(names, rows, strict=True)]


def read(source: Source, run: Run) -> Volume:
    """Reads a volume and normalises it as in training. Slices that lie in another plane are refused."""
    options = run.options
    if source.image is None:
        volume = phantom(int(source.name[-3:]))
        if volume.label.max() >= options.classes:
            raise ValueError(
                f"--weights {run.weights} are of {options.classes} classes, phantoms have more: give --data"
            )
        return replace(volume, image=scaled(volume, options.window_level))
    volume = load_volume(
        source.subject,
        source.image,
        source.label,
        classes=options.classes,
        ignore_affine=options.ignore_affine,
        orientation=options.orientation,
    )
    known = not options.ignore_affine and options.orientation != STORED
    if known and run.axes and axes_of(volume) != run.axes:
        raise ValueError(
            f"{source.image} has slices of another plane than the training: its axes are {axes_of(volume)} and not "
            f"{run.axes}: give --orientation {run.axes} to turn it, or --orientation {STORED} to leave it as it is"
        )
    return replace(volume, image=scaled(volume, options.window_level))


def complete(options: PredictOptions, run: Run) -> Run:
    """The run, with the options that were given again."""
    names = ("output", "detector_weights", "ignore_affine", "orientation", "window_level")
    given = {name: value for name in names if (value := getattr(options, name)) not in (None, False)}
    chosen = changed(run.options, given)
    check_window(chosen.window_level)
    if chosen.detector in LEARNT and chosen.detector_weights is None:
        raise ValueError(f"--weights {options.weights} needs --detector-weights, those of --detector {chosen.detector}")
    return run._replace(options=chosen)


def in_file_space(labels: Tensor, volume: Volume, classes: int) -> Nifti:
    """Labels (Z, H, W) of a volume as an array (x, y, z) whose axes are those of the volume's file."""
    array = labels.numpy().T.astype(np.uint8 if classes <= 256 else np.uint16)
    affine = np.eye(4) if volume.affine is None else volume.affine
    return reorient(Nifti(array, affine), volume.file_axes) if volume.file_axes else Nifti(array, affine)


def draw_overlay(volume: Volume, labels: Tensor, *, labelled: bool) -> Figure:
    """Draws the slice with the largest prediction, and the reference if there is one."""
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


def begin(run: Run) -> dict[str, Any]:
    """The record of earlier predictions in --output. Those of other weights are refused."""
    options, settings = run.options, run.options.settings()
    made_by = {name: settings[name] for name in ("ignore_affine", "orientation", "window_level")}
    made_by |= {"weights": digest(run.weights), "detector_weights": digest(options.detector_weights)}
    path = options.output / "predictions.json"
    record: dict[str, Any] = read_json(path) if path.is_file() else {"made_by": made_by, "volumes": {}}
    if different := [name for name, value in made_by.items() if record["made_by"].get(name) != value]:
        options_of = " and ".join(f"--{name.replace('_', '-')}" for name in different)
        raise ValueError(
            f"--output {options.output} holds predictions with other {options_of}: choose another --output"
        )
    return record


def segment(source: Source, run: Run, detector: KeypointDetector) -> dict[str, Any]:
    """Writes the prediction and picture of a volume; returns its entry in the record, with scores if it has labels."""
    options, volume = run.options, read(source, run)
    unlabelled, by_slice = replace(volume, label=torch.zeros_like(volume.label)), options.normalise == "slice"
    (stack,) = prepare([unlabelled], detector, patch=options.patch, resize=options.resize, by_slice=by_slice)
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


def segment_all(options: PredictOptions) -> dict[str, Any]:
    """Segments the volumes that are not segmented yet; returns the content of predictions.json."""
    run = complete(options, read_run(options.weights))
    chosen, output = sources(options.data, options.limit), options.output
    if options.data and output.resolve().is_relative_to(options.data.resolve()):
        raise ValueError(f"--output {output} must lie outside of --data, or its files would be read as images")
    run.model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    detector = build_detector(run.options)
    with claimed(output):
        record = begin(run)
        for source in tqdm(chosen, desc="volumes"):
            before = record["volumes"].get(source.name)
            if before is None or not (output / f"{source.name}.nii.gz").is_file():
                record["volumes"][source.name] = segment(source, run, detector)
                write_json(record, output / "predictions.json")
            elif before["image"] != digest(source.image):
                raise ValueError(f"--output {output} holds the prediction of another image {source.name}")
    print(f"{output}: {summary([record['volumes'][source.name] for source in chosen])}")
    if seen := {source.subject for source in chosen} & set(run.subjects["train"]):
        print(f"The network was trained on {len(seen)} of these subjects: {', '.join(sorted(seen))}")
    return record
