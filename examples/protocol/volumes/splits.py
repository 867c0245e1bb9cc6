"""Splits: the folds of a cross-validation over subjects of which few are labelled, and their files.

A split is a JSON file. Each fold lists the subjects to test on, and the subjects to train on in a random order. The
first M of these are labelled, so the labelled subjects of a small M are also labelled for a larger M.

    {"seed": 0, "folds": [{"train": ["s3", "s1", "s4"], "test": ["s2", "s5"]}, ...]}
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.protocol.files import read_json, write_json


class Fold(NamedTuple):
    """The subjects to train on, in the order in which they are labelled, and the subjects to test on."""

    train: list[str]
    test: list[str]

    def labelled(self, count: int) -> list[str]:
        """The first of the training subjects."""
        if not 1 <= count <= len(self.train):
            raise ValueError(f"the fold has {len(self.train)} subjects to train on, got {count} to be labelled")
        return self.train[:count]


def make_split(subjects: Sequence[str], *, folds: int = 5, seed: int = 0) -> list[Fold]:
    """Draws folds so that each subject is for testing in one of them and for training in the others."""
    names = sorted(set(subjects))
    if not 2 <= folds <= len(names):
        raise ValueError(f"there must be 2 folds or more, and a subject for each, got {folds=} for {len(names)}")
    shuffled = random.Random(seed).sample(names, len(names))
    tests = [sorted(shuffled[i::folds]) for i in range(folds)]
    return [
        Fold(random.Random(f"{seed} {i}").sample(rest := [n for n in names if n not in test], len(rest)), test)
        for i, test in enumerate(tests)
    ]


def write_split(split: Sequence[Fold], path: Path, *, seed: int) -> None:
    write_json({"seed": seed, "folds": [fold._asdict() for fold in split]}, path)


def read_split(path: Path, subjects: Sequence[str]) -> list[Fold]:
    """Reads the split of a file, whose subjects must all be among ``subjects``."""
    try:
        folds = [Fold(fold["train"], fold["test"]) for fold in read_json(path)["folds"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a split as splits.py describes it: {error!r}") from error
    for number, fold in enumerate(folds):
        if both := set(fold.train) & set(fold.test):
            raise ValueError(f"{path} trains and tests on the same subjects in fold {number}: {sorted(both)}")
        if unknown := {*fold.train, *fold.test} - set(subjects):
            raise ValueError(f"{path} names subjects that the data set does not have: {sorted(unknown)[:5]}")
    return folds
