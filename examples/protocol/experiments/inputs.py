"""The inputs of a run: the volumes, slices and split that options ask for."""

from collections.abc import Iterable, Sequence

from examples.protocol.files import write
from examples.protocol.models.cache import cached
from examples.protocol.models.detectors import build_detector
from examples.protocol.options import Options
from examples.protocol.volumes.loading import load_volumes
from examples.protocol.volumes.splits import Fold, make_split, read_split, write_split
from examples.protocol.volumes.stacks import Stack, prepare, say
from examples.protocol.volumes.volume import Volume


def read_volumes(options: Options, *, labelled: bool = True) -> list[Volume]:
    """The volumes of ``--data``, or the phantoms."""
    return load_volumes(
        options.data,
        limit=options.limit,
        classes=options.classes,
        labelled=labelled,
        ignore_affine=options.ignore_affine,
        orientation=options.orientation,
        window=options.window_level,
    )


def prepare_volumes(volumes: Sequence[Volume], options: Options) -> list[Stack]:
    """Volumes as slices or patches with keypoints."""
    detector, by_slice = cached(build_detector(options), options), options.normalise == "slice"
    return prepare(volumes, detector, patch=options.patch, resize=options.resize, by_slice=by_slice)


def load_stacks(options: Options, *, labelled: bool = True) -> list[Stack]:
    """All volumes as slices or patches with keypoints; says which slices have none."""
    stacks = prepare_volumes(read_volumes(options, labelled=labelled), options)
    for stack in stacks if options.detector != "none" else ():
        if empty := [z for z, keypoints in enumerate(stack.keypoints) if not keypoints.valid.any()]:
            say(stack, f"no keypoints in slices {', '.join(map(str, empty))}, nothing for KAF layers")
    return stacks


def load_split(options: Options, volumes: Iterable[Volume]) -> list[Fold]:
    """The split of ``--split``, or one that is drawn with ``--seed``."""
    subjects = [volume.subject for volume in volumes]
    if options.split:
        return read_split(options.split, subjects)
    return make_split(subjects, folds=options.folds, seed=options.seed)


def fold_of(split: Sequence[Fold], fold: int) -> Fold:
    """One fold of a split."""
    if not 0 <= fold < len(split):
        raise ValueError(f"--fold must be 0 to {len(split) - 1}, got {fold}")
    return split[fold]


def keep_split(split: Sequence[Fold], options: Options) -> None:
    """Writes a split to --output: a copy of the file of ``--split``, or what was drawn."""
    path = options.output / "split.json"
    if options.split:
        text = options.split.read_text()
        write(path, lambda temporary: temporary.write_text(text))
    else:
        write_split(split, path, seed=options.seed)
