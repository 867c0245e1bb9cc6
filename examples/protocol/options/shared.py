"""The options that the commands share, and which of them fit together."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

from examples.protocol.options.choices import LEARNT, MODELS, VOLUMETRIC, Fusion
from examples.protocol.options.fields import option
from examples.protocol.options.recipes import PRESETS, Recipe


@dataclass(frozen=True, kw_only=True)
class Options(Recipe):
    """The options of all commands that prepare a data set or build networks."""

    title: ClassVar[str] = "options that commands share"

    preset: str = option("the settings for a data set (default: phantom)", default="phantom", choices=PRESETS)
    data: Path | None = option("a folder of NIfTI volumes (default: the phantoms)", default=None, type=Path, place=True)
    limit: int | None = option("use at most this many subjects", default=None, type=int)
    output: Path = option("the folder for weights, checkpoints and logs", type=Path, place=True)
    resume: bool = option(
        "continue from the last checkpoint in --output, if there is one",
        default=False,
        action="store_true",
        place=True,
    )
    save_every: int = option("epochs between two checkpoints", default=5, type=int, metavar="EPOCHS", place=True)
    seed: int = option("of the split and of the training", default=0, type=int)
    folds: int = option("the number of folds of the split", default=5, type=int)
    cache: Path | None = option(
        "a folder in which detected keypoints are kept, to be found again by the content of the images",
        default=None,
        type=Path,
        metavar="FOLDER",
        place=True,
    )
    workers: int = option(
        "processes that load batches while the network learns; 0 loads them in between", default=0, type=int, place=True
    )
    split: Path | None = option("a split to use, instead of one drawn with --seed", default=None, type=Path, place=True)
    mixed_precision: str | None = option(
        "the precision to compute in (default: the one that accelerate is configured for)",
        default=None,
        choices=("no", "fp16", "bf16"),
    )
    channels_last: bool = option(
        "keep the network's channels last in memory, which often makes convolutions faster",
        default=False,
        action="store_true",
    )
    model: str = option("the network", default="kaf-unet", choices=MODELS)
    scales: tuple[int, ...] = option(
        "the encoder blocks that a KAF layer follows (default: all except the deepest)",
        default=None,
        type=int,
        nargs="*",
    )
    window: int = option(
        "the window of SwinUNETR's attention, in patches of 2 pixels along each axis", default=7, type=int
    )
    fusion: Fusion = option(
        "how a KAF layer's map is fused with the features", default="concat", choices=get_args(Fusion)
    )
    detector_weights: Path | None = option(
        "the weights of a learned detector, as its authors publish them",
        default=None,
        type=Path,
        metavar="FILE",
        place=True,
    )
    drop_keypoints: float = option(
        "train without a random share of each slice's keypoints, up to this",
        default=0.0,
        type=float,
        metavar="SHARE",
    )
    share_attention: bool = option(
        "use one Transformer for the KAF layers of all scales", default=False, action="store_true"
    )
    token_loss: float = option(
        "in fine-tuning, also train tokens to predict classes, with this weight",
        default=0.0,
        type=float,
        metavar="WEIGHT",
    )

    @classmethod
    def defaults(cls, arguments: Sequence[str] | None) -> dict[str, Any]:
        """The preset's values, except where a command has its own default."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=PRESETS, default=cls.preset)
        of_preset = vars(PRESETS[first.parse_known_args(arguments)[0].preset])
        recipe = {f.name: f for f in fields(Recipe)}
        inherited = [f.name for f in fields(cls) if recipe.get(f.name) is f or f.default is MISSING]
        return {name: of_preset[name] for name in inherited if name in of_preset}

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a layer after each encoder block except the deepest, unless --scales is given."""
        scales = values.get("scales")
        return {**values, "scales": tuple(range(values["levels"] - 1)) if scales is None else scales}

    def check(self) -> None:
        """Refuses options that do not fit together."""
        super().check()
        self._check_ranges()
        self._check_network()

    def _check_ranges(self) -> None:
        if not self.resize > 0:
            raise ValueError(f"--resize must be a factor above 0, got {self.resize}")
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, got {self.workers}")
        if not 0 <= self.drop_keypoints <= 1:
            raise ValueError(f"--drop-keypoints must be a share from 0 to 1, got {self.drop_keypoints}")
        if self.window < 1:
            raise ValueError(f"--window must be 1 or more, got {self.window}")
        if not self.token_loss >= 0:
            raise ValueError(f"--token-loss must be a weight of 0 or more, got {self.token_loss}")
        if self.levels < 3:
            raise ValueError(f"--levels must be 3 or more, got {self.levels}")
        if not set(self.scales) <= set(range(self.levels - 1)):
            raise ValueError(f"--scales must be among 0 to {self.levels - 2}, got {list(self.scales)}")
        if (self.detector in LEARNT) != (self.detector_weights is not None):
            raise ValueError(f"--detector-weights are for {', '.join(LEARNT)}, which need them, got {self.detector}")

    def _check_network(self) -> None:
        model, dims, patch = self.model, self.spatial_dims, list(self.patch)
        if self.token_loss and (model != "kaf-unet" or dims == 3):
            raise ValueError(f"--token-loss needs --model kaf-unet and --spatial-dims 2, got {model} and {dims}")
        if len(patch) != dims:
            raise ValueError(f"--patch must have --spatial-dims {dims} edges, got {patch}")
        if dims == 3 and (model not in VOLUMETRIC or self.detector in LEARNT):
            raise ValueError(
                f"--spatial-dims 3 supports --model {', '.join(VOLUMETRIC)} and --detector sift, grid or none, "
                f"got {model} and {self.detector}"
            )
        swin = model.startswith("swin")
        needs, divisor = (f"--model {model}", 32) if swin else (f"--levels {self.levels}", 2 ** (self.levels - 1))
        if any(edge % divisor for edge in patch):
            raise ValueError(f"{needs} needs a --patch divisible by {divisor}, got {patch}")
