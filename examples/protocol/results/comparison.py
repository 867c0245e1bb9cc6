"""The comparison of two methods: mean and deviation over folds, and paired differences over subjects."""

from collections import defaultdict
from collections.abc import Sequence
from math import isnan, nan
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import wilcoxon

from examples.protocol.options import ComparisonOptions

Result = dict[str, Any]  # what finetune.py writes, with the method, fold, seed and number of labelled subjects
Subject = tuple[int, str]  # a fold and the name of one of its test subjects


class Difference(NamedTuple):
    """How far one method is ahead of another: Dice, its p-value, and the number of folds, of all folds."""

    dice: float
    p: float
    ahead: int
    folds: int


def spread(values: Sequence[float], *, digits: int = 3) -> str:
    """The mean of values and, if there are several, their standard deviation. NaN is left out: a fold lacks a class."""
    values = [value for value in values if not isnan(value)] or [nan]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def subject_scores(results: Sequence[Result]) -> dict[Subject, float]:
    """The Dice of each subject: the mean over its volumes and seeds of the mean over the classes in each.

    Volumes of one subject resemble each other. A test that treats them as independent gives too small a p-value.
    """
    scores = defaultdict(list)
    for result in results:
        for subject, *classes in result["scores"]:
            present = [value for value in classes if not isnan(value)]
            if present:
                scores[result["fold"], subject].append(mean(present))
    return {subject: mean(values) for subject, values in scores.items()}


def difference(results: Sequence[Result], others: Sequence[Result]) -> Difference:
    """Compares two methods on the subjects that both have, with a two-sided Wilcoxon signed-rank test."""
    ours, theirs = subject_scores(results), subject_scores(others)
    pairs = {subject: ours[subject] - theirs[subject] for subject in ours if subject in theirs}
    if not pairs:
        raise ValueError("the methods to be compared share no subject: run both on the same folds and --labelled")
    folds = defaultdict(list)
    for (fold, _), value in pairs.items():
        folds[fold].append(value)
    differences = list(pairs.values())
    p = float(wilcoxon(differences).pvalue) if any(differences) else 1.0
    return Difference(mean(differences), p, sum(mean(values) > 0 for values in folds.values()), len(folds))


def compare(results: Sequence[Result], reference: str, titles: dict[str, str]) -> list[str]:
    """A table that shows how far the reference is ahead of each other method, for each number of labelled subjects."""
    counts = list(dict.fromkeys(result["M"] for result in results))
    of = {key: [r for r in results if (r["method"], r["M"]) == key] for key in {(r["method"], r["M"]) for r in results}}
    lines = [f"{titles[reference]} ahead of (Dice, mean over subjects; p; folds)", ""]
    lines += [f"| method | {' | '.join(f'M = {m}' for m in counts)} |", "|---" * (len(counts) + 1) + "|"]
    for method, title in titles.items():
        if method != reference:
            pairs = [(of.get((reference, m)), of.get((method, m))) for m in counts]
            cells = [describe(difference(ours, theirs)) if ours and theirs else "" for ours, theirs in pairs]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def describe(d: Difference) -> str:
    return f"{d.dice:+.3f}, p = {d.p:.2g}, {d.ahead} of {d.folds}"


def runs_ahead(results: Sequence[Result], others: Sequence[Result]) -> str:
    """The number of runs, by fold and seed, in which the first method is ahead, of all runs that both have."""
    theirs = {(result["fold"], result["seed"]): result["dice"] for result in others}
    ahead = [result["dice"] > theirs[run] for result in results if (run := (result["fold"], result["seed"])) in theirs]
    return f"{sum(ahead)} of {len(ahead)}"


def print_comparison(results: Sequence[Result], options: ComparisonOptions) -> None:
    """Compares a reference with the other methods, on the results that the options choose."""
    chosen = {"M": options.labelled, "fold": options.folds, "seed": options.seeds}
    results = [r for r in results if all(r[key] in values for key, values in chosen.items() if values)]
    results = [r for r in results if not options.levels or r["settings"]["levels"] in options.levels]
    methods = list(dict.fromkeys(result["method"] for result in results))
    if options.reference not in methods:
        raise ValueError(
            f"--reference must be among the methods of {options.results}, {methods}, got {options.reference!r}"
        )
    for count in dict.fromkeys(result["M"] for result in results):
        of = {name: [r for r in results if (r["method"], r["M"]) == (name, count)] for name in methods}
        print(f"\n| M = {count} | Dice | runs in which {options.reference} is ahead |\n|---|---|---|")
        for name in (name for name in methods if of[name]):
            folds = {r["fold"] for r in of[name]}
            dice = [mean(r["dice"] for r in of[name] if r["fold"] == fold) for fold in sorted(folds)]
            print(f"| {name} | {spread(dice)} | {runs_ahead(of[options.reference], of[name])} |")
    print("", *compare(results, options.reference, {name: name for name in methods}), sep="\n")
