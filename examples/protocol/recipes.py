"""What the scripts share on the command line, and the paper's recipes."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from examples.protocol import scripts
from examples.protocol.data import add_reading_options, check_window, load_volumes
from examples.protocol.detectors import DETECTORS, LEARNT, build_detector
from examples.protocol.files import write
from examples.protocol.networks import MODELS, VOLUMETRIC
from examples.protocol.phantom import Volume
from examples.protocol.splits import Fold, make_split, read_split, write_split
from examples.protocol.stacks import Stack, prepare, say
from kaf_layer.positions import PositionType


@dataclass(frozen=True)
class Recipe:
    """What differs between data sets."""

    classes: int
    patch: tuple[int, ...]
    width: int
    threshold: float  # of the contrast, between relative positions
    lr: float  # of fine-tuning
    epochs: int  # of fine-tuning
    normalise: str = "volume"
    resize: float = 1.0
    levels: int = 5
    loss: str = "ce"
    batch: int = 10  # of fine-tuning
    steps_per_epoch: int | None = None  # as many as the slices fill batches
    embed_dim: int = 256
    depth: int = 6
    detector: str = "sift"
    max_keypoints: int = 512
    spacing: float = 12.0
    spatial_dims: int = 2
    window_level: tuple[float, float] | None = None  # of intensities


# Sections 4 and B of the paper. Synapse: the 13 organs of its archive, the settings of CHD, which is CT too, and the
# window of Chen et al. ("TransUNet", 2021). The last four are ours. Sunnybrook: the whole field of view, at a size
# that two CPU cores can train on, with levels so few that the receptive field is a third of it (the paper's: 140 of 352
# pixels). How else it differs was found on the subjects of benchmarks/results/sunnybrook-inner-split.json, none of whom
# the folds 0 and 1 of the default split test. Lumbar: the whole field of view, in its own resolution.
PRESETS = {
    "acdc": Recipe(classes=4, patch=(352, 352), width=48, threshold=0.35, lr=5e-4, epochs=200),
    "chd": Recipe(classes=8, patch=(512, 512), width=32, threshold=0.1, lr=5e-5, epochs=100),
    "synapse": Recipe(
        classes=14, patch=(512, 512), width=32, threshold=0.1, lr=5e-5, epochs=100, window_level=(-125.0, 275.0)
    ),
    "sunnybrook": Recipe(
        classes=2,
        patch=(96, 96),
        width=8,
        threshold=0.35,
        lr=3e-3,
        epochs=40,
        normalise="slice",
        resize=0.375,
        levels=3,
        loss="dice_ce",
        batch=6,
        steps_per_epoch=10,
        embed_dim=64,
        depth=2,
        detector="grid",
        spacing=32.0,
    ),
    "hippocampus": Recipe(
        classes=3,
        patch=(40, 56, 40),
        width=8,
        threshold=0.35,
        lr=1e-2,
        epochs=80,
        levels=3,
        loss="dice_ce",
        batch=2,
        steps_per_epoch=10,
        embed_dim=64,
        depth=2,
        detector="grid",
        spacing=8.0,
        spatial_dims=3,
    ),
    "lumbar": Recipe(
        classes=6,
        patch=(224, 224),
        width=8,
        threshold=0.35,
        lr=3e-3,
        epochs=60,
        loss="dice_ce",
        batch=6,
        steps_per_epoch=10,
        embed_dim=64,
        depth=2,
        max_keypoints=256,
    ),
    "phantom": Recipe(classes=4, patch=(128, 128), width=8, threshold=0.35, lr=3e-3, epochs=40),
}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options of every script; those without a default take the preset's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=scripts.HelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="phantom", help="the settings for a data set (default: phantom)")
    add("--data", type=Path, help="a folder of NIfTI volumes (default: the phantoms)")
    add("--limit", type=int, help="use at most so many subjects")
    add_reading_options(parser)
    add("--output", type=Path, required=True, help="a folder for weights, checkpoints and logs")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output, if there is one")
    add("--save-every", type=int, default=5, metavar="EPOCHS", help="between two checkpoints")
    add("--seed", type=int, default=0, help="of the split and the training")
    add("--folds", type=int, default=5, help="of the split")
    add("--split", type=Path, help="a split to use, instead of one drawn with --seed")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="what to compute in (default: as accelerate's)")
    add("--model", choices=MODELS, default="kaf-unet", help="the network")
    add("--classes", type=int, help="the background included")
    add("--spatial-dims", type=int, choices=(2, 3), help="2 to learn from slices, 3 from volumes")
    add("--resize", type=float, metavar="FACTOR", help="of a slice's or volume's sides, before it is cut to the patch")
    add("--patch", type=int, nargs="+", metavar="EDGE", help="H W, or D H W, to which all are padded and cropped")
    add("--normalise", choices=("volume", "slice"), help="whether patches are brought to one scale slice by slice too")
    add("--width", type=int, help="channels of the first block")
    add("--levels", type=int, help="encoder blocks of a UNet or an FCN, each at half the size of the one before")
    add("--scales", type=int, nargs="*", help="which encoder blocks a KAF layer follows (default: all but the deepest)")
    add("--depth", type=int, help="attention blocks of each KAF layer")
    add("--embed-dim", type=int, help="channels of a token")
    add("--window", type=int, default=7, help="of SwinUNETR's attention, in patches of 2 pixels along each axis")
    add("--fusion", choices=("concat", "add"), default="concat", help="of a KAF layer's map with the features")
    add(
        "--position", choices=get_args(PositionType), default="absolute", help="how attention knows where keypoints are"
    )
    add("--detector", choices=DETECTORS, help="of the keypoints")
    add("--detector-weights", type=Path, metavar="FILE", help="of a detector that has learnt, as its authors give them")
    add("--max-keypoints", type=int, help="of an original slice, but for a grid's")
    add("--spacing", type=float, help="of the grid's keypoints, in pixels of an original slice")
    add(
        "--drop-keypoints", type=float, default=0.0, metavar="SHARE", help="train without up to this share of a slice's"
    )
    add("--share-attention", action="store_true", help="one Transformer for the KAF layers of all scales")
    add("--token-loss", type=float, default=0.0, metavar="WEIGHT", help="fine-tune tokens to tell classes too")
    add("--steps-per-epoch", type=int, help="default: as many as the slices fill batches")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default=parser.get_default("preset"))
    of_preset = asdict(PRESETS[first.parse_known_args(arguments)[0].preset])
    unset = {action.dest for action in parser._actions if action.default is None}
    parser.set_defaults(**{name: value for name, value in of_preset.items() if name in unset})  # as --help shows too
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Completes and refuses what does not fit together, by the options' names."""
    if not options.resize > 0:
        raise ValueError(f"--resize must be a factor above 0, got {options.resize}")
    check_window(options.window_level)
    if not 0 <= options.drop_keypoints <= 1:
        raise ValueError(f"--drop-keypoints must be a share from 0 to 1, got {options.drop_keypoints}")
    if options.window < 1:
        raise ValueError(f"--window must be 1 or more, got {options.window}")
    if not options.token_loss >= 0:
        raise ValueError(f"--token-loss must be a weight of 0 or more, got {options.token_loss}")
    if options.token_loss and (options.model != "kaf-unet" or options.spatial_dims == 3):
        raise ValueError(
            f"--token-loss needs --model kaf-unet and --spatial-dims 2, got {options.model} and {options.spatial_dims}"
        )
    if len(options.patch) != options.spatial_dims:
        raise ValueError(f"--patch must have --spatial-dims {options.spatial_dims} edges, got {options.patch}")
    if options.spatial_dims == 3 and (options.model not in VOLUMETRIC or options.detector in LEARNT):
        raise ValueError(
            f"--spatial-dims 3 has --model {', '.join(VOLUMETRIC)} and --detector sift, grid or none, "
            f"got {options.model} and {options.detector}"
        )
    if options.levels < 3:
        raise ValueError(f"--levels must be 3 or more, got {options.levels}")
    swin = options.model.startswith("swin")
    needs, divisor = (
        ("--model " + options.model, 32) if swin else (f"--levels {options.levels}", 2 ** (options.levels - 1))
    )
    if any(edge % divisor for edge in options.patch):
        raise ValueError(f"{needs} needs a --patch divisible by {divisor}, got {options.patch}")
    if (options.detector in LEARNT) != (options.detector_weights is not None):
        raise ValueError(f"--detector-weights are for {', '.join(LEARNT)}, which need them, got {options.detector}")
    if options.scales is None:
        options.scales = list(range(options.levels - 1))
    if not set(options.scales) <= set(range(options.levels - 1)):
        raise ValueError(f"--scales must be among 0 to {options.levels - 2}, got {options.scales}")


def read_volumes(options: argparse.Namespace, *, labelled: bool = True) -> list[Volume]:
    return load_volumes(
        options.data,
        limit=options.limit,
        classes=options.classes,
        labelled=labelled,
        ignore_affine=options.ignore_affine,
        orientation=options.orientation,
        window=options.window_level,
    )


def load_stacks(options: argparse.Namespace, *, labelled: bool = True) -> list[Stack]:
    stacks = prepare(
        read_volumes(options, labelled=labelled),
        build_detector(options),
        patch=tuple(options.patch),
        resize=options.resize,
        by_slice=options.normalise == "slice",
    )
    for stack in stacks if options.detector != "none" else ():
        if empty := [z for z, keypoints in enumerate(stack.keypoints) if not keypoints.valid.any()]:
            say(stack, f"no keypoints in slices {', '.join(map(str, empty))}, nothing for KAF layers")
    return stacks


def load_split(options: argparse.Namespace, volumes: Iterable[Volume]) -> list[Fold]:
    subjects = [volume.subject for volume in volumes]
    if options.split:
        return read_split(options.split, subjects)
    return make_split(subjects, folds=options.folds, seed=options.seed)


def keep_split(split: Sequence[Fold], options: argparse.Namespace) -> None:
    """Writes a split to --output: what --split holds as it is, else what was drawn."""
    path = options.output / "split.json"
    if options.split:
        text = options.split.read_text()
        write(path, lambda temporary: temporary.write_text(text))
    else:
        write_split(split, path, seed=options.seed)
