"""Cross-validation: pretrains and fine-tunes every method on every fold, and makes the table of the results."""

import shlex
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import product
from multiprocessing import get_context

import torch

from examples.protocol.experiments.finetuning import finetune
from examples.protocol.experiments.inputs import keep_split, load_split, load_stacks, read_volumes
from examples.protocol.experiments.pretraining import pretrain
from examples.protocol.files import claimed, read_json, write_json
from examples.protocol.options import FinetuneOptions, Options, PretrainOptions, parse
from examples.protocol.options.table import Table, TableOptions, parts
from examples.protocol.results.comparison import Result
from examples.protocol.results.tables import report
from examples.protocol.volumes.splits import Fold
from examples.protocol.volumes.stacks import Stack


def cross_validate(table: Table, arguments: Sequence[str]) -> list[Result]:
    """Runs the trainings that are not finished yet, writes the table, and returns the results.

    Args:
        table: the parsed command line.
        arguments: the command line itself, for the report.
    """
    own, shared, options = table
    volumes = read_volumes(options)
    split = load_split(options, volumes)
    folds = own.test_folds or range(len(split))
    if not set(folds) <= set(range(len(split))):
        raise ValueError(f"--test-folds must be among 0 to {len(split) - 1}, got {list(own.test_folds)}")
    for fold, count in product(folds, own.labelled):
        split[fold].labelled(count)
    with claimed(own.output):
        keep_options(own, options, split)
        keep_split(split, options)
        results = run_folds(folds, own, shared)
    subjects = len({volume.subject for volume in volumes})
    data = f"{options.data.name if options.data else 'phantoms'}, {subjects} subjects, {len(volumes)} volumes"
    command = f"python -m examples.protocol.cross_validate {shlex.join(arguments)}"
    text = report(results, command, data, own, folds=len(split), beside=own.rows(options.preset))
    (own.output / "table.md").write_text(text)
    write_json(results, own.output / "results.json")
    print(text)
    return results


def keep_options(own: TableOptions, shared: Options, split: Sequence[Fold]) -> None:
    """Writes the options of the runs in --output to a file, and refuses to mix runs with different options."""
    path = own.output / "options.json"
    now = shared.settings() | {"pretrain": list(own.pretrain), "finetune": own.finetuning}
    now |= {"split": [fold._asdict() for fold in split]}
    before = read_json(path) if path.is_file() else now
    if different := [name for name, value in before.items() if now.get(name) != value]:
        raise ValueError(f"{own.output} holds runs with another {' and '.join(different)}: choose another --output")
    write_json(now, path)


@lru_cache(maxsize=4)
def load_once(*arguments: str) -> list[Stack]:
    """Loads the slices once for all folds of this process."""
    return load_stacks(parse(FinetuneOptions, arguments))


def run_fold(fold: int, own: TableOptions, shared: list[str]) -> list[Result]:
    """Runs all methods and numbers of labelled subjects on one fold."""
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
            pretrain(parse(PretrainOptions, arguments), stacks)
            start = ["--pretrained", str(output / "weights.pt")]
        for labelled in own.labelled:
            arguments = [*common, *own.finetuning, *options, *start, "--labelled", str(labelled)]
            arguments += ["--output", str(folder / f"M{labelled}")]
            result = finetune(parse(FinetuneOptions, arguments), stacks)
            results.append(result | {"method": name, "fold": fold, "seed": seed, "M": labelled})
    return results


def run_folds(folds: Sequence[int], own: TableOptions, shared: list[str]) -> list[Result]:
    """Runs all folds, --jobs at a time."""
    if own.jobs == 1:
        return [result for fold in folds for result in run_fold(fold, own, shared)]
    threads = max(1, torch.get_num_threads() // own.jobs)
    with ProcessPoolExecutor(own.jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        jobs = [pool.submit(run_fold, fold, own, shared) for fold in folds]
        return [result for job in jobs for result in job.result()]
