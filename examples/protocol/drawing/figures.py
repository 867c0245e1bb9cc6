"""The paper's figures for any data and networks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from kornia.augmentation import RandomAffine
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from tqdm import tqdm

from examples.protocol.experiments.inference import predict
from examples.protocol.experiments.inputs import prepare_volumes, read_volumes
from examples.protocol.experiments.runs import Run, read_run
from examples.protocol.files import read_json
from examples.protocol.options import FigureOptions, Options, changed
from examples.protocol.options.choices import MODELS
from examples.protocol.options.table import title
from examples.protocol.results.scores import mean_score, score
from examples.protocol.volumes.stacks import Stack, match_slices
from kaf_layer import Augmented, GridDetector, Keypoints
from kaf_layer.augmentation import KeypointAugmentation
from kaf_layer.plotting import (
    COLORS,
    draw_image,
    draw_keypoints,
    draw_labels,
    draw_matches,
    draw_similarity,
    self_similarity,
)

Named = tuple[str, Run]
TURN: dict[str, dict[str, Any]] = {
    "rotated by 25°": {"degrees": (25.0, 25.0)},
    "scaled by 0.75": {"degrees": 0.0, "scale": (0.75, 0.75)},
}


def grid_of(rows: int, columns: int, image: Tensor, *, images: int = 1) -> tuple[Figure, Any]:
    """A figure as wide as the text of a page at most, with axes (rows, columns), each for images side by side."""
    height, width = image.shape[-2:]
    cell = min(7.0 / columns, 2.2 * images)  # inches
    size = columns * cell, rows * (cell * height / (images * width) + 0.2) + 0.5
    figure = Figure(figsize=size, dpi=300)
    figure.set_layout_engine("compressed", w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    return figure, figure.subplots(rows, columns, squeeze=False)


def largest(stack: Stack) -> int:
    """The slice with the most foreground, or the middle one if there is no foreground."""
    areas = (stack.labels > 0).sum((1, 2))
    return int(areas.argmax()) if areas.any() else len(areas) // 2


def row_title(axis: Any, text: str) -> None:
    """Writes a title to the left of a row of axes."""
    axis.text(-0.03, 0.5, text, transform=axis.transAxes, ha="right", va="center", rotation=90)


def draw_detectors(stacks: Sequence[Stack], *, spacing: float) -> Figure:
    """Draws the keypoints of a slice of each volume, detected and on a grid."""
    figure, axes = grid_of(2, len(stacks), stacks[0].images)
    for column, stack in zip(axes.T, stacks, strict=True):
        z = largest(stack)
        grid = GridDetector(spacing)(stack.images[z : z + 1])[0]
        for axis, keypoints in zip(column, (stack.keypoints[z], grid), strict=True):
            axis.set_title(f"{draw_keypoints(axis, stack.images[z, 0], keypoints, s=4)} keypoints")
        column[0].set_title(f"{stack.volume.subject}\n{column[0].get_title()}")
    row_title(axes[0, 0], "detected")
    row_title(axes[1, 0], "grid")
    return figure


def transform(images: Tensor, keypoints: Keypoints, **options: Any) -> Augmented:
    """Transforms all images in the same way, and fills their outside with the darkest value."""
    darkest = images.min()
    moved = KeypointAugmentation(RandomAffine(p=1.0, **options))(images - darkest, keypoints)
    return moved._replace(images=moved.images + darkest)


def draw_correspondences(stacks: Sequence[Stack]) -> Figure:
    """Draws neighbouring slices with their matches, and both after an augmentation."""
    torch.manual_seed(0)
    figure, axes = grid_of(len(stacks), 2, stacks[0].images, images=2)
    for row, stack in zip(axes, stacks, strict=True):
        z = min(largest(stack), max(len(stack.images) - 2, 0))
        pair = [z, min(z + 1, len(stack.images) - 1)]
        images, keypoints = stack.images[pair], Keypoints.stack([stack.keypoints[i] for i in pair])
        matches = match_slices(keypoints[0], keypoints[1])
        moved = transform(images, keypoints, degrees=25.0, translate=(0.1, 0.1), scale=(0.8, 1.25))
        for axis, (shown, points) in zip(row, ((images, keypoints), moved[:2]), strict=True):
            count = draw_matches(axis, shown[0, 0], points[0], shown[1, 0], points[1], matches)
            axis.set_title(f"{count} matches")
        row_title(row[0], stack.volume.subject)
    for axis, text in zip(axes[0], ("before the augmentation", "after"), strict=True):
        axis.set_title(f"{text}: {axis.get_title()}")
    return figure


def draw_thresholds(stacks: Sequence[Stack], *, shown: tuple[float, float, float] = (5, 30, 1000)) -> Figure:
    """Draws the matches of a pair for three distances, and the mean number of matches for many distances."""
    stack = stacks[0]
    figure, axes = grid_of(2, 2, stack.images, images=2)
    z = min(largest(stack), max(len(stack.images) - 2, 0))
    following = min(z + 1, len(stack.images) - 1)
    a, b = stack.keypoints[z], stack.keypoints[following]
    for axis, distance in zip(axes.flat, shown, strict=False):
        matches = match_slices(a, b, max_distance=distance)
        count = draw_matches(axis, stack.images[z, 0], a, stack.images[following, 0], b, matches)
        limit = f"within {distance:g} pixels" if distance < sum(a.image_size) else "anywhere"
        axis.set_title(f"{limit}: {count} matches")
    distances = [2, 4, 6, 10, 15, 20, 30, 45, 60, 90, 120, 180]
    pairs = [pair for s in stacks for pair in zip(s.keypoints, s.keypoints[1:], strict=False)]
    counts = [
        sum(int((match_slices(*pair, max_distance=distance).indices >= 0).sum()) for pair in pairs) / max(len(pairs), 1)
        for distance in tqdm(distances, desc="thresholds", leave=False)
    ]
    axis = axes[1, 1]
    axis.plot(distances, counts, marker="o", markersize=3, color="#377eb8")
    axis.axvline(30, color="grey", linewidth=0.8, linestyle="--")
    axis.annotate("30, the default", (30, 0), (3, 3), textcoords="offset points")
    axis.set(xlabel="largest Manhattan distance (pixels)", ylabel="matches for each pair", xlim=0, ylim=0)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_segmentations(stacks: Sequence[Stack], runs: Sequence[Named]) -> Figure:
    """Draws a slice of each volume with the reference, the networks' outlines and the Dice of the whole volume."""
    figure, axes = grid_of(len(stacks), 2 + len(runs), stacks[0].images)
    classes: set[int] = set()
    for row, stack in zip(axes, stacks, strict=True):
        z, volume = largest(stack), stack.volume
        for axis in row:
            draw_image(axis, stack.images[z, 0])
        outlines = [stack.labels[z]]
        for axis, (_, run) in zip(row[2:], runs, strict=True):
            labels = predict(run.model, stack)
            outlines.append(stack.crop(labels)[z])
            dice = score(labels, volume.label, classes=run.options.classes, spacing=volume.spacing).dice
            axis.text(0.04, 0.04, f"Dice {mean_score([dice]):.2f}", transform=axis.transAxes, color="white")
        for axis, labels in zip(row[1:], outlines, strict=True):
            classes.update(draw_labels(axis, None, labels, fill=0.3, linewidths=0.7))
        row_title(row[0], volume.subject)
    for axis, text in zip(axes[0], ("image", "reference", *(name for name, _ in runs)), strict=True):
        axis.set_title(text)
    patches = [Patch(color=COLORS[(c - 1) % len(COLORS)], label=f"class {c}") for c in sorted(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches) or 1, frameon=False)
    return figure


@torch.no_grad()
def draw_similarities(stack: Stack, runs: Sequence[Named], *, scales: Sequence[int] = (1, 3)) -> Figure:
    """Draws how similar all places are to one keypoint, in the encoders' maps of two scales, for three views."""
    z = largest(stack)
    images, keypoints = stack.images[z : z + 1], Keypoints.stack([stack.keypoints[z]])
    target = torch.stack([axis.float().mean() for axis in (stack.labels[z] > 0).nonzero().T.flip(0)])
    positions = keypoints.positions[0].where(keypoints.valid[0, :, None], torch.inf)
    query = int((positions - target).norm(dim=-1).nan_to_num(torch.inf).argmin())
    views = {"as it is": Augmented(images, keypoints, None)}
    views |= {name: transform(images, keypoints, **options) for name, options in TURN.items()}
    figure, axes = grid_of(len(views), 1 + len(scales) * len(runs), images)
    for row, (text, (view, moved, _)) in zip(axes, views.items(), strict=True):
        heading = text == "as it is"
        point = moved.positions[0, query].tolist()
        draw_keypoints(row[0], view[0, 0], moved[0], s=3, linewidths=0)
        row[0].plot(*point, marker="*", color="cyan", markersize=9, markeredgecolor="black", markeredgewidth=0.5)
        row[0].set_title("image, keypoints" if heading else "")
        row_title(row[0], text)
        columns = iter(row[1:])
        for name, run in runs:
            features = cast("nn.Module", run.model.encoder)(view, moved).features
            for scale in scales:
                axis = next(columns)
                similarity = self_similarity(features[scale][0], point, moved.image_size)
                drawn = draw_similarity(axis, view[0, 0], similarity, point, vmin=0.0, vmax=1.0)
                axis.set_title(f"{name}\n1/{2**scale} of the size" if heading else "")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.01, aspect=40, label="cosine similarity")
    assert bar.solids is not None
    bar.solids.set(alpha=1.0)
    return figure


def named(folder: Path) -> Named:
    """The run in a folder, with its method's title if it is of cross_validate.py, or else with its network's."""
    run = read_run(folder / "weights.pt")
    of_table = folder.parent.name.startswith("seed")
    name = title(folder.parents[1].name.replace("_", " ")) if of_table else MODELS[run.options.model]
    return name.replace(", ", ",\n"), run


def folders(options: FigureOptions) -> list[Path]:
    """The folders of the runs to show."""
    return folders_of(options.table, options) if options.table else list(options.runs)


def folders_of(table: Path, options: FigureOptions) -> list[Path]:
    """The runs of a table with one fold, seed and number of labelled subjects (by default the largest)."""
    if not (table / "results.json").is_file():
        raise FileNotFoundError(f"--table {table} has no results.json: is it an --output of cross_validate.py?")
    results = read_json(table / "results.json")
    labelled = max(result["M"] for result in results) if options.labelled is None else options.labelled
    chosen = {"fold": options.fold, "seed": options.seed, "M": labelled}
    methods = [result["method"] for result in results if all(result[key] == value for key, value in chosen.items())]
    if not methods:
        folds, seeds, counts = (sorted({result[key] for result in results}) for key in chosen)
        raise ValueError(
            f"--table {table} has no run of --fold {options.fold}, --seed {options.seed} and --labelled {labelled}, it "
            f"has those of folds {folds}, seeds {seeds} and M = {counts}"
        )
    runs = f"seed{options.seed}/M{labelled}"
    return [table / f"fold{options.fold}" / method.replace(" ", "_") / runs for method in methods]


def check(runs: Sequence[Run]) -> None:
    """Refuses runs with different preparation or test subjects, since a figure shows the same slices for all."""
    for option in ("fold", "patch", "resize", "normalise", "window_level", "detector", "max_keypoints", "spacing"):
        if len(values := [getattr(run.options, option) for run in runs]) > values.count(values[0]):
            raise ValueError(f"--runs must share their --{option.replace('_', '-')}, got {values}")
    if any(run.subjects["test"] != runs[0].subjects["test"] for run in runs):
        raise ValueError("--runs must be tested on the same subjects, give those of one split and fold")


def load(options: FigureOptions, runs: Sequence[Run]) -> list[Stack]:
    """The volumes to show: one of each subject, among those that the networks were tested on."""
    chosen: Options = options
    if runs:
        check(runs)
        own = {name: getattr(options, name) for name in ("data", "limit", "cache", "detector_weights")}
        chosen = changed(runs[0].options, own)
    volumes = read_volumes(chosen)
    if runs:
        tested = runs[0].subjects["test"]
        volumes = [volume for volume in volumes if volume.subject in tested]
        if not volumes:
            raise ValueError(f"--data {options.data} has none of the subjects of --runs: {tested[:3]}")
    one_each = list({volume.subject: volume for volume in reversed(volumes)}.values())[::-1][: options.volumes]
    return prepare_volumes(one_each, chosen)


def draw_figures(options: FigureOptions) -> None:
    """Writes the figures that the options name, or all that can be drawn."""
    runs = [named(folder) for folder in folders(options)]
    stacks = load(options, [run for _, run in runs])
    with_encoder = [(name, run) for name, run in runs if hasattr(run.model, "encoder")]
    drawn: dict[str, Callable[[], Figure]] = {
        "keypoints": lambda: draw_detectors(stacks, spacing=options.spacing),
        "correspondences": lambda: draw_correspondences(stacks[:3]),
        "threshold": lambda: draw_thresholds(stacks),
    }
    if runs:
        drawn["segmentations"] = lambda: draw_segmentations(stacks, runs)
    if with_encoder:
        drawn["similarity"] = lambda: draw_similarities(stacks[0], with_encoder)
    options.output.mkdir(parents=True, exist_ok=True)
    with rc_context({"font.size": 7, "axes.titlesize": 7}):
        for name in options.figures or drawn:
            drawn[name]().savefig(options.output / f"{name}.png", bbox_inches="tight", pad_inches=0.03)
            print(f"wrote {options.output / name}.png")
