"""The tables of a cross-validation."""

import os
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isnan, nan
from statistics import mean

import torch

from examples.protocol.options.table import Rows, TableOptions, title
from examples.protocol.results.comparison import Result, compare, spread
from examples.protocol.results.scores import mean_score, missed

NETWORK: tuple[str, ...] = (
    "spatial_dims",
    "resize",
    "patch",
    "normalise",
    "width",
    "levels",
    "scales",
    "fusion",
    "embed_dim",
    "depth",
)
NETWORK += ("position", "detector", "max_keypoints", "spacing", "drop_keypoints", "share_attention", "token_loss")


def table(results: Sequence[Result], beside: Mapping[str, Mapping[str, float]]) -> str:
    """The Dice of each method for each M over folds: the mean over classes with the rows of others, then each class."""
    methods, counts = (list(dict.fromkeys(result[key] for result in results)) for key in ("method", "M"))
    classes = len(results[0]["scores"][0]) - 1
    lines = []
    for chosen in [None, *(range(classes) if classes > 1 else ())]:
        lines += ["", f"Dice of class {chosen + 1}" if chosen is not None else "Dice, mean over classes", ""]
        lines.append(f"| method | parameters | {' | '.join(f'M = {m}' for m in counts)} | training |")
        lines.append("|---" * (len(counts) + 3) + "|")
        for name in methods:
            own = [result for result in results if result["method"] == name]
            cells = [spread(over_folds([r for r in own if r["M"] == count], chosen)) for count in counts]
            seconds = mean(result["training_seconds"] for result in own)
            parameters = f"{own[0]['parameters'] / 1e6:.2f} M"
            lines.append(f"| {title(name)} | {parameters} | {' | '.join(cells)} | {seconds:.0f} s |")
        for name, row in beside.items() if chosen is None else ():
            cells = [f"{row[str(count)]:.3f}" if str(count) in row else "" for count in counts]
            lines.append(f"| {name} | | {' | '.join(cells)} | |")
    return "\n".join(lines)


def distances(results: Sequence[Result]) -> list[str]:
    """The distances between surfaces, in a table like that of Dice; empty for older runs, which lack them."""
    if not all("hd95" in result for result in results):
        return []
    methods, counts = (list(dict.fromkeys(result[key] for result in results)) for key in ("method", "M"))
    lines = ["95th percentile of the Hausdorff distance in mm, mean over the classes that were found", ""]
    lines += [f"| method | {' | '.join(f'M = {m}' for m in counts)} |", "|---" * (len(counts) + 1) + "|"]
    for name in methods:
        cells = []
        for count in counts:
            own = [result for result in results if (result["method"], result["M"]) == (name, count)]
            lost = sum(missed([row[1:] for row in result["hd95"]]) for result in own)
            found = spread(over_folds(own, None, "hd95"), digits=1).replace("nan", "none found")
            cells.append(found + (f", {lost} missed" if lost else ""))
        lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    return lines


def over_folds(results: Sequence[Result], chosen: int | None, kind: str = "scores") -> list[float]:
    """A score of each fold, the mean over its seeds: of one class, or the mean over all classes if it is None."""
    folds = defaultdict(list)
    for result in results:
        rows = [row[1:] if chosen is None else row[1 + chosen : 2 + chosen] for row in result[kind]]
        folds[result["fold"]].append(mean_score(rows))
    return [mean([value for value in values if not isnan(value)] or [nan]) for values in folds.values()]


def report(results: Sequence[Result], command: str, data: str, own: TableOptions, *, folds: int, beside: Rows) -> str:
    """The tables, with all that is needed to read them and to make them again."""
    first = results[0]
    chosen, versions = first["settings"], first["versions"]
    tested = sorted({result["fold"] for result in results})
    steps = f"{chosen['steps_per_epoch']} steps" if chosen["steps_per_epoch"] else "one pass over the slices"
    facts = {
        "command": f"`{command}`",
        "data": data,
        "folds": f"{len(tested)} ({', '.join(map(str, tested))}) of {folds}; mean ± deviation over them",
        "seeds": ", ".join(map(str, own.seeds)),
        "fine-tuning": f"{chosen['epochs']} epochs of {steps}, batch {chosen['batch']}, learning rate {chosen['lr']}, "
        f"loss {chosen['loss']}",
        "pretraining": f"`{shlex.join(own.pretrain)}`" if own.pretrain else "pretrain.py's defaults",
        "network": ", ".join(f"{name} {chosen[name]}" for name in NETWORK),
        "hardware": f"{os.cpu_count()} CPU cores" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    lines = [*(f"- {name}: {fact}" for name, fact in facts.items()), table(results, beside)]
    lines += ["", *distances(results)]
    if own.compared_with and len(own.methods) > 1:
        lines += ["", *compare(results, own.compared_with, {name: title(name) for name in own.methods})]
    return "\n".join(lines) + "\n"
