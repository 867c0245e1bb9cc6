"""The paper's table: Dice on unseen subjects, of networks trained on M labelled ones, over folds.

    python -m examples.protocol.cross_validate --output outputs/table --methods unet kaf-unet  # on phantoms
    python -m examples.protocol.cross_validate --output outputs/acdc --preset acdc --data ACDC/training \
        --labelled 1 2 6 --methods unet unet-c2 swin-unetr kaf-unet unet+pcl kaf-unet+kaf

A method is a network of finetune.py --model, trained from random weights; behind a "+" is what its encoder is
pretrained by on all training subjects of the fold, a method of pretrain.py: "kaf", all of Eq. 3, "pcl", its positional
contrast alone, "simclr", "rotation", "pirl", "glcl-global", "glcl", "caid" or "ssl".
Options of its own may follow, for ablations: --methods kaf-unet "kaf-unet --fusion add --epochs 80", those that all
scripts know if it is pretrained: "kaf-unet+kaf --depth 2". Other options go to pretrain.py and finetune.py, those in
--pretrain "..." and --finetune "..." to one of them; --epochs, --lr, --batch and --loss are those of fine-tuning.
What was killed goes on where it was, by the same command. Writes
table.md, results.json, options.json, split.json to --output.
Each method is compared with kaf-unet, or with what --reference says: the mean difference over the
subjects tested, each the mean of its volumes, and the p-value of a Wilcoxon signed-rank test. Published rows stand
beside ours, the paper's for its presets, others by --beside rows.json: {"UNet, Table 1": {"1": 0.5, "2": 0.6}, ...}
"""

import argparse
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import product
from math import isnan, nan
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch

from examples.protocol import finetune, pretrain, scripts
from examples.protocol.comparison import PUBLISHED, Result, compare, published, spread
from examples.protocol.files import claimed, read_json, write_json
from examples.protocol.methods import METHODS
from examples.protocol.networks import MODELS
from examples.protocol.recipes import keep_split, load_split, load_stacks, parse, parser_of, read_volumes
from examples.protocol.scores import mean_score, missed
from examples.protocol.splits import Fold
from examples.protocol.stacks import Stack
from examples.protocol.training import settings

NETWORK = ("spatial_dims", "resize", "patch", "normalise", "width", "levels", "scales", "fusion")
NETWORK += (
    "embed_dim",
    "depth",
    "position",
    "detector",
    "max_keypoints",
    "spacing",
    "drop_keypoints",
    "share_attention",
    "token_loss",
)
OWN = ("--lr", "--epochs", "--batch", "--steps-per-epoch", "--save-every")  # what may differ between the two stages
FINETUNING = {"--epochs": int, "--lr": float, "--batch": int, "--loss": str}  # may be given without --finetune
OF_PRETRAINING = ("--weights", "--temperature", "--threshold", "--max-distance", "--optimizer")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All options that finetune.py and pretrain.py share may be given too: see finetune.py --help.",
        formatter_class=scripts.HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--methods", nargs="+", type=method, default=["unet", "kaf-unet"], help="what to compare")
    parser.add_argument("--labelled", nargs="+", type=int, default=[1, 2, 6], metavar="M", help="subjects")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the training; --seed draws the folds")
    parser.add_argument("--reference", type=method, help="the method that the others are compared with")
    parser.add_argument("--test-folds", nargs="+", type=int, metavar="FOLD", help="only these of --folds")
    pretraining, finetuning = only(*OWN, *OF_PRETRAINING), only(*OWN, "--loss")
    parser.add_argument("--pretrain", type=pretraining, default=[], metavar="OPTIONS", help="for pretrain.py alone")
    parser.add_argument("--finetune", type=finetuning, default=[], metavar="OPTIONS", help="for finetune.py alone")
    for name, kind in FINETUNING.items():
        parser.add_argument(name, type=kind, help="of fine-tuning, as finetune.py takes it")
    parser.add_argument("--beside", type=published, metavar="FILE", help="Dice of others, by row and M")
    parser.add_argument("--jobs", type=int, default=1, help="folds at a time")
    return parser


def method(name: str) -> str:
    model, pretraining, _ = parts(name)
    if model not in MODELS or pretraining not in ("", *METHODS):
        choices = f"{', '.join(MODELS)}, with or without +{', +'.join(METHODS)}"
        raise argparse.ArgumentTypeError(f"{name!r} is none of {choices}")
    return name


def parts(name: str) -> tuple[str, str, list[str]]:
    """A method's network, pretraining and options."""
    network, *options = shlex.split(name)
    model, _, pretraining = network.partition("+")
    return model, pretraining, options


def only(*names: str) -> Callable[[str], list[str]]:
    """Splits a text into options, which must be among these."""

    def split(text: str) -> list[str]:
        options = shlex.split(text)
        if others := [option for option in options if option.startswith("--") and option.split("=")[0] not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(others)} must be given to all scripts, outside the quotes")
        return options

    return split


def directly(own: argparse.Namespace) -> list[str]:
    """The options of fine-tuning that were given without --finetune."""
    given = {name: getattr(own, name.removeprefix("--")) for name in FINETUNING}
    return [text for name, value in given.items() if value is not None for text in (name, str(value))]


def check_options(own: argparse.Namespace, shared: list[str]) -> None:
    """Parses the options of every run, so that what they refuse is refused before anything is written."""
    for name in own.methods:
        model, pretraining, options = parts(name)
        common = [*shared, "--model", model, "--output", str(own.output)]
        parse(finetune.parser(), [*common, *own.finetune, *options])
        if pretraining:
            pretrain.parse_pretraining([*common, *own.pretrain, *options, "--method", pretraining])


def complete(own: argparse.Namespace, options: argparse.Namespace) -> None:
    """Finds the reference and the rows to stand beside; refuses those that have nothing in common with the runs."""
    if own.reference is None:
        own.reference = "kaf-unet" if "kaf-unet" in own.methods else None
    elif own.reference not in own.methods:
        raise ValueError(f"--reference must be among --methods, got {own.reference!r} and {own.methods}")
    if own.beside is None:
        rows = PUBLISHED / f"{options.preset}.json"
        own.beside = published(str(rows)) if rows.is_file() else {}
    elif not {str(count) for count in own.labelled} & {count for row in own.beside.values() for count in row}:
        found = sorted({int(count) for row in own.beside.values() for count in row})
        raise ValueError(f"--beside has rows for M = {found}, none of which --labelled asks for, got {own.labelled}")


def keep_options(own: argparse.Namespace, shared: argparse.Namespace, split: Sequence[Fold]) -> None:
    """Writes down what the runs in --output are trained by; refuses to mix them with others."""
    path = own.output / "options.json"
    now = settings(shared) | {"pretrain": own.pretrain, "finetune": own.finetune}
    now |= {"split": [fold._asdict() for fold in split]}
    before = read_json(path) if path.is_file() else now
    if different := [name for name, value in before.items() if now.get(name) != value]:
        raise ValueError(f"{own.output} holds runs with another {' and '.join(different)}: choose another --output")
    write_json(now, path)


@lru_cache(maxsize=4)
def load_once(*arguments: str) -> list[Stack]:
    """The slices, for all folds that this process runs."""
    return load_stacks(parse(finetune.parser(), arguments))


def run_fold(fold: int, own: argparse.Namespace, shared: list[str]) -> list[Result]:
    """All methods and numbers of labels on one fold."""
    results = []
    for name, seed in product(own.methods, own.seeds):
        model, pretraining, options = parts(name)
        stacks = load_once(*shared, *options, "--output", str(own.output))
        folder = own.output / f"fold{fold}" / name.replace(" ", "_") / f"seed{seed}"
        common = [*shared, "--model", model, "--fold", str(fold), "--seed", str(seed)]
        common += ["--split", str(own.output / "split.json"), "--resume"]
        start: list[str] = []
        if pretraining:
            output = folder / "pretrain"
            arguments = [*common, *own.pretrain, *options, "--method", pretraining, "--output", str(output)]
            pretrain.main(arguments, stacks=stacks)
            start = ["--pretrained", str(output / "weights.pt")]
        for labelled in own.labelled:
            arguments = [*common, *own.finetune, *options, *start, "--labelled", str(labelled)]
            result = finetune.main([*arguments, "--output", str(folder / f"M{labelled}")], stacks=stacks)
            results.append(result | {"method": name, "fold": fold, "seed": seed, "M": labelled})
    return results


def run_folds(folds: Sequence[int], own: argparse.Namespace, shared: list[str]) -> list[Result]:
    """All results, of --jobs folds at a time."""
    if own.jobs == 1:
        return [result for fold in folds for result in run_fold(fold, own, shared)]
    threads = max(1, torch.get_num_threads() // own.jobs)
    workers = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads, "initargs": (threads,)}
    with ProcessPoolExecutor(own.jobs, **workers) as pool:
        jobs = [pool.submit(run_fold, fold, own, shared) for fold in folds]
        return [result for job in jobs for result in job.result()]


def title(name: str) -> str:
    model, pretraining, options = parts(name)
    pretrained = f", pretrained by {METHODS[pretraining].title}" if pretraining else ""
    return MODELS[model] + pretrained + (f", {' '.join(options)}" if options else "")


def table(results: Sequence[Result], beside: Mapping[str, Mapping[str, float]]) -> str:
    """Dice of each method for each M: the mean over classes, and others' beside it, then each class, over the folds."""
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
    """Distances of surfaces, as the table of Dice; nothing of runs from before they were measured."""
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
    """Dice, or another kind of score, of each fold, the mean over its seeds: of one class, or over all if None."""
    folds = defaultdict(list)
    for result in results:
        rows = [row[1:] if chosen is None else row[1 + chosen : 2 + chosen] for row in result[kind]]
        folds[result["fold"]].append(mean_score(rows))
    return [mean([value for value in values if not isnan(value)] or [nan]) for values in folds.values()]


def report(results: Sequence[Result], command: str, data: str, own: argparse.Namespace, *, folds: int) -> str:
    """The tables, and what one needs to know to read them and to make them again."""
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
    lines = [*(f"- {name}: {fact}" for name, fact in facts.items()), table(results, own.beside)]
    lines += ["", *distances(results)]
    if own.reference and len(own.methods) > 1:
        lines += ["", *compare(results, own.reference, {name: title(name) for name in own.methods})]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("cross_validate.py is one process that trains --jobs folds at a time, start it with python")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    of_scripts = parser()
    own, shared = of_scripts.parse_known_args(arguments)
    if misplaced := [name for name in OF_PRETRAINING if any(text.split("=")[0] == name for text in shared)]:
        of_scripts.error(f'{misplaced[0]} is an option of pretraining, give it as --pretrain "{misplaced[0]} ..."')
    own.finetune = directly(own) + own.finetune
    options = parse(parser_of(None), [*shared, "--output", str(own.output)])
    complete(own, options)
    check_options(own, shared)
    volumes = read_volumes(options)
    split = load_split(options, volumes)
    folds = own.test_folds or range(len(split))
    if not set(folds) <= set(range(len(split))):
        raise ValueError(f"--test-folds must be among 0 to {len(split) - 1}, got {own.test_folds}")
    for fold, count in product(folds, own.labelled):
        split[fold].labelled(count)
    with claimed(own.output):
        keep_options(own, options, split)
        keep_split(split, options)
        results = run_folds(folds, own, shared)
    subjects = len({volume.subject for volume in volumes})
    data = f"{options.data.name if options.data else 'phantoms'}, {subjects} subjects, {len(volumes)} volumes"
    command = f"python -m examples.protocol.cross_validate {shlex.join(arguments)}"
    text = report(results, command, data, own, folds=len(split))
    (own.output / "table.md").write_text(text)
    write_json(results, own.output / "results.json")
    print(text)
    return results


if __name__ == "__main__":
    scripts.run(main)
