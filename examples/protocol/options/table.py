"""The options of ``cross_validate``: its own, and those that it passes to pretraining and fine-tuning."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from examples.protocol.files import read_json
from examples.protocol.options.choices import METHODS, MODELS
from examples.protocol.options.commands import FinetuneOptions, PretrainOptions
from examples.protocol.options.fields import CommandLine, build, option, parse, parser_of
from examples.protocol.options.shared import Options

PUBLISHED = Path(__file__).parents[1] / "published"  # the paper's rows, by preset
OWN = ("--lr", "--epochs", "--batch", "--steps-per-epoch", "--save-every")  # what may differ between the two stages
OF_PRETRAINING = ("--weights", "--temperature", "--threshold", "--max-distance", "--optimizer")
Rows = dict[str, dict[str, float]]  # Dice by title and number of labelled subjects


class MethodName(NamedTuple):
    """The parts of a method's name, such as "kaf-unet+pcl --depth 2"."""

    model: str
    pretraining: str  # empty if there is none
    options: list[str]


def parts(name: str) -> MethodName:
    """Splits a method's name."""
    network, *options = shlex.split(name)
    model, _, pretraining = network.partition("+")
    return MethodName(model, pretraining, options)


def title(name: str) -> str:
    """A method's name in words."""
    model, pretraining, options = parts(name)
    pretrained = f", pretrained by {METHODS[pretraining].title}" if pretraining else ""
    return MODELS[model] + pretrained + (f", {' '.join(options)}" if options else "")


def method(name: str) -> str:
    """Checks a method's name."""
    model, pretraining, _ = parts(name)
    if model not in MODELS or pretraining not in ("", *METHODS):
        choices = f"{', '.join(MODELS)}, with or without +{', +'.join(METHODS)}"
        raise argparse.ArgumentTypeError(f"{name!r} is none of {choices}")
    return name


def only(*names: str) -> Callable[[str], tuple[str, ...]]:
    """Splits a text into options, which must be among these."""

    def split(text: str) -> tuple[str, ...]:
        options = shlex.split(text)
        if others := [option for option in options if option.startswith("--") and option.split("=")[0] not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(others)} must be given to all scripts, outside the quotes")
        return tuple(options)

    return split


def published(path: str) -> Rows:
    """The rows of a JSON file."""
    try:
        rows = read_json(Path(path))
        return {title: {str(int(m)): float(dice) for m, dice in row.items()} for title, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f'{path} must hold {{"title": {{"M": Dice, ...}}, ...}}: {error}') from error


@dataclass(frozen=True, kw_only=True)
class TableOptions(CommandLine):
    """The options of ``cross_validate`` alone."""

    title: ClassVar[str] = "options of the table"

    output: Path = option("a folder", type=Path)
    methods: tuple[str, ...] = option("the methods to compare", default=("unet", "kaf-unet"), nargs="+", type=method)
    labelled: tuple[int, ...] = option(
        "the numbers of subjects to train on", default=(1, 2, 6), nargs="+", type=int, metavar="M"
    )
    seeds: tuple[int, ...] = option(
        "the seeds of the training; --seed draws the folds", default=(0,), nargs="+", type=int
    )
    reference: str | None = option(
        "the method that the others are compared with (default: kaf-unet, if it is among --methods)",
        default=None,
        type=method,
    )
    test_folds: tuple[int, ...] = option(
        "only these of --folds (default: all)", default=(), nargs="+", type=int, metavar="FOLD"
    )
    pretrain: tuple[str, ...] = option(
        "options for pretrain.py alone, in quotes", default=(), type=only(*OWN, *OF_PRETRAINING), metavar="OPTIONS"
    )
    finetune: tuple[str, ...] = option(
        "options for finetune.py alone, in quotes", default=(), type=only(*OWN, "--loss"), metavar="OPTIONS"
    )
    epochs: int | None = option("of fine-tuning, as finetune.py takes it", default=None, type=int)
    lr: float | None = option("of fine-tuning, as finetune.py takes it", default=None, type=float)
    batch: int | None = option("of fine-tuning, as finetune.py takes it", default=None, type=int)
    loss: str | None = option("of fine-tuning, as finetune.py takes it", default=None)
    beside: Rows | None = option(
        "a JSON file with the Dice of others, by row and M (default: the paper's rows, for its presets)",
        default=None,
        type=published,
        metavar="FILE",
    )
    jobs: int = option("how many folds to train at a time", default=1, type=int)

    @property
    def finetuning(self) -> list[str]:
        """The options of fine-tuning alone, those that were given without --finetune first."""
        given = {"--epochs": self.epochs, "--lr": self.lr, "--batch": self.batch, "--loss": self.loss}
        direct = [text for name, value in given.items() if value is not None for text in (name, str(value))]
        return [*direct, *self.finetune]

    @property
    def compared_with(self) -> str | None:
        """The method that the others are compared with."""
        return self.reference or ("kaf-unet" if "kaf-unet" in self.methods else None)

    def check(self) -> None:
        """Refuses a reference and rows that have nothing in common with the runs."""
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"--reference must be among --methods, got {self.reference!r} and {list(self.methods)}")
        if self.beside is not None:
            found = sorted({int(count) for row in self.beside.values() for count in row})
            if not set(self.labelled) & set(found):
                raise ValueError(
                    f"--beside has rows for M = {found}, none of which --labelled asks for, got {list(self.labelled)}"
                )

    def rows(self, preset: str) -> Rows:
        """The rows of others, by default those that the paper has for a preset."""
        path = PUBLISHED / f"{preset}.json"
        if self.beside is not None:
            return self.beside
        return published(str(path)) if path.is_file() else {}


class Table(NamedTuple):
    """What a command line of ``cross_validate`` asks for."""

    own: TableOptions
    shared: list[str]  # the arguments of all runs
    options: Options  # what these arguments say


def table_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of the options of ``cross_validate`` alone."""
    epilog = "All options that finetune.py and pretrain.py share may be given, too: see finetune.py --help."
    return parser_of(TableOptions, description, epilog=epilog, allow_abbrev=False)


def parse_table(arguments: Sequence[str], description: str | None = None) -> Table:
    """Parses the options of every run too, so that what they refuse is refused before anything is written.

    Raises:
        ValueError: if options do not fit together.
        SystemExit: if they cannot be parsed, or ask for help.
    """
    parser = table_parser(description)
    known, shared = parser.parse_known_args(arguments)
    if misplaced := [name for name in OF_PRETRAINING if any(text.split("=")[0] == name for text in shared)]:
        parser.error(f'{misplaced[0]} is an option of pretraining, give it as --pretrain "{misplaced[0]} ..."')
    own = build(TableOptions, vars(known))
    output = ["--output", str(own.output)]
    for name in own.methods:
        model, pretraining, options = parts(name)
        common = [*shared, "--model", model, *output]
        parse(FinetuneOptions, [*common, *own.finetuning, *options])
        if pretraining:
            parse(PretrainOptions, [*common, *own.pretrain, *options, "--method", pretraining])
    return Table(own, shared, parse(Options, [*shared, *output]))
