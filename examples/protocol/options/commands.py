"""The options of single commands."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from examples.protocol.options.choices import LOSSES, METHODS, OPTIMIZERS
from examples.protocol.options.fields import CommandLine, option
from examples.protocol.options.reading import ReadingOptions
from examples.protocol.options.shared import Options

FIGURES = ("keypoints", "correspondences", "threshold", "segmentations", "similarity")
OF_NETWORKS = FIGURES[3:]


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Options):
    """The options of ``finetune``."""

    title: ClassVar[str] = "options of fine-tuning"

    fold: int = option("the fold of --folds to test on", default=0, type=int)
    labelled: int = option("the number of subjects to train on", default=2, type=int, metavar="M")
    pretrained: Path | None = option(
        "the weights to start from, as pretrain.py writes them", default=None, type=Path, place=True
    )
    lr: float = option("the learning rate, which falls to zero along a cosine", type=float)
    loss: str = option("cross-entropy, alone or with the Dice loss", choices=LOSSES)
    epochs: int = option("the number of epochs, each of --steps-per-epoch", type=int)
    batch: int = option("slices in a batch, over all processes", type=int)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(Options):
    """The options of ``pretrain``."""

    title: ClassVar[str] = "options of pretraining"

    method: str = option("what the encoder learns by", default="kaf", choices=METHODS)
    fold: int = option("the fold of --folds to leave out, for tests", default=0, type=int)
    optimizer: str = option("the optimizer; sgd is the paper's", default="sgd", choices=OPTIMIZERS)
    lr: float = option("the learning rate, which falls to zero along a cosine", default=0.002, type=float)
    epochs: int = option("the number of epochs, each of --steps-per-epoch", default=50, type=int)
    batch: int = option("pairs of slices, or slices, in a batch, over all processes", default=32, type=int)
    weights: tuple[float, float, float] = option(
        "the weights of the parts of Eq. 3", default=(1.0, 1.0, 0.01), type=float, nargs=3
    )
    temperature: float = option("the temperature of a contrast (default: the method's own)", default=None, type=float)
    threshold: float = option("slices whose relative positions differ by less than this are similar", type=float)
    max_distance: float = option("the most pixels between matching keypoints", default=30.0, type=float)

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the values that the method determines."""
        chosen, method = super().completed(values), METHODS[values["method"]]
        given = chosen.get("temperature")
        chosen["temperature"] = method.temperature if given is None else given
        return chosen | ({} if method.weights is None else {"weights": method.weights})

    def check(self) -> None:
        """Refuses volumes in one piece, too."""
        super().check()
        if self.spatial_dims == 3:
            raise ValueError("pretraining learns from slices, got --spatial-dims 3")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ReadingOptions):
    """The options of ``predict``."""

    title: ClassVar[str] = "options of prediction"

    weights: Path = option("weights.pt of finetune.py, with result.json beside it", type=Path, metavar="FILE")
    data: Path | None = option(
        "the folder of NIfTI volumes, with or without labels (default: the phantoms)",
        default=None,
        type=Path,
        metavar="FOLDER",
    )
    output: Path = option("the folder for the predictions", type=Path, metavar="FOLDER")
    limit: int | None = option("segment at most this many volumes", default=None, type=int)
    detector_weights: Path | None = option(
        "the weights of a learned detector, as in the training", default=None, type=Path, metavar="FILE"
    )

    def check(self) -> None:
        """Refuses less than one volume, too."""
        super().check()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least one volume, got {self.limit}")


def figure_name(text: str) -> str:
    """Checks the name of a figure."""
    if text not in FIGURES:
        raise argparse.ArgumentTypeError(f"must be among {', '.join(FIGURES)}, got {text!r}")
    return text


@dataclass(frozen=True, kw_only=True)
class FigureOptions(Options):
    """The options of ``figures``."""

    title: ClassVar[str] = "options of figures"

    figures: tuple[str, ...] = option(
        f"{', '.join(FIGURES)} (default: all that can be drawn)",
        default=(),
        positional=True,
        nargs="*",
        type=figure_name,
        metavar="FIGURE",
    )
    runs: tuple[Path, ...] = option("outputs of finetune.py, of one fold", default=(), type=Path, nargs="+")
    table: Path | None = option("an output of cross_validate.py, instead of --runs", default=None, type=Path)
    fold: int = option("of --table (default: 0)", default=0, type=int)
    labelled: int | None = option("of --table (default: the most)", default=None, type=int, metavar="M")
    volumes: int = option("how many volumes to show (default: 4)", default=4, type=int)

    def check(self) -> None:
        """Refuses figures of networks without networks, and networks that are named in two ways."""
        super().check()
        if self.table and self.runs:
            raise ValueError("--table and --runs cannot be given together")
        missing = [name for name in self.figures if name in OF_NETWORKS]
        if missing and not self.runs and not self.table:
            raise ValueError(f"{' and '.join(missing)} of networks: give --table or --runs")


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ReadingOptions):
    """The options of ``demo``."""

    title: ClassVar[str] = "options of the demo"

    data: Path | None = option("a folder of NIfTI volumes (default: synthetic volumes)", default=None, type=Path)
    subjects: int = option("how many to use; the first half is for training", default=40, type=int)
    steps: int = option("the steps of each training", default=300, type=int)
    seeds: tuple[int, ...] = option(
        "each model is trained once with each of these seeds", default=(0, 1, 2), type=int, nargs="+"
    )
    width: int = option("channels of the first block", default=8, type=int)
    batch: int = option("slices in a batch", default=6, type=int)
    output: Path = option("the picture", default=Path("outputs/demo.png"), type=Path)


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadingOptions):
    """The options of ``data``."""

    title: ClassVar[str] = "options of the listing"

    path: Path | None = option(
        "a folder of NIfTI files (default: the phantoms)", default=None, positional=True, nargs="?", type=Path
    )
    limit: int | None = option("list at most this many subjects", default=None, type=int)


@dataclass(frozen=True, kw_only=True)
class CurveOptions(CommandLine):
    """The options of ``curves``."""

    folder: Path = option("the --output of cross_validate.py", positional=True, type=Path)


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(CommandLine):
    """The options of ``comparison``."""

    results: Path = option(
        "a results.json of cross_validate.py, or one in benchmarks/results", positional=True, type=Path
    )
    reference: str = option("the method that the others are compared with")
    labelled: tuple[int, ...] = option("which M to take (default: all)", default=(), type=int, nargs="+")
    folds: tuple[int, ...] = option("which folds to take (default: all)", default=(), type=int, nargs="+")
    seeds: tuple[int, ...] = option("which seeds to take (default: all)", default=(), type=int, nargs="+")
    levels: tuple[int, ...] = option(
        "which levels of the networks to take (default: all)", default=(), type=int, nargs="+"
    )
