"""What a run leaves in its output folder: which runs may continue it, and which must not replace it."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.protocol.files import load
from examples.protocol.options import Options

Settings = Mapping[str, Any]
# Names in messages for settings that are compared by content.
NAMES = {"subjects": "subjects (--data, --split, --fold or --labelled)", "digest": "weights of --pretrained"}


class History(NamedTuple):
    """The seconds of a training, including those before it was resumed, and the mean loss of each epoch."""

    seconds: float
    losses: list[float]


def restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> History:
    """Loads a checkpoint into a module and its optimizer, and returns the history until then.

    Raises:
        ValueError: if the checkpoint is of a run with other settings; the message names the differences.
    """
    content = load(path)
    if different := differences(content["settings"], settings):
        raise ValueError(f"{path} was written with other options than these: {different}")
    module.load_state_dict(content["module"])
    optimizer.load_state_dict(content["optimizer"])
    return History(content["seconds"], content["losses"])


def differences(before: Settings, now: Settings) -> str:
    """The differences between the settings of an earlier run and these, in words, or an empty text."""
    different = [name for name, value in before.items() if now.get(name) != value]
    return ", ".join(
        f"{NAMES[name]} differ"
        if name in NAMES
        else f"--{name.replace('_', '-')} {before[name]} then, {now.get(name)} now"
        for name in different
    )


def refuse_other(before: Settings, now: Settings, output: Path, *, state: str = "a finished") -> None:
    """Keeps a run from being replaced by another.

    Args:
        before: the settings of the run in --output.
        now: the settings of this run.
        output: the folder.
        state: the state of the run in --output, in words.

    Raises:
        ValueError: if the settings differ; the message names the differences.
    """
    if different := differences(before, now):
        raise ValueError(
            f"--output {output} holds {state} run with other options: {different}; "
            "choose another --output, or remove it"
        )


def check_unfinished(options: Options, settings: Settings, say: Callable[[str], None]) -> None:
    """Keeps an unfinished run from being replaced by another, and says if the same run starts over.

    Raises:
        ValueError: if --output holds the checkpoint of a run with other settings; the message names the differences.
    """
    path = options.output / "checkpoint.pt"
    if options.resume or not path.is_file():
        return
    content = load(path)
    refuse_other(content["settings"], settings, options.output, state="an unfinished")
    say(
        f"{options.output} holds the same run, killed after epoch {len(content['losses'])}. It starts over: "
        "to continue it, give --resume."
    )


def digest(path: Path | None) -> str | None:
    """The hash of a file's content, which identifies it wherever it is."""
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_pretrained(module: nn.Module, path: Path) -> str:
    """Loads the weights of a file that fit a module, and reports what was loaded, skipped and missing."""
    weights, own = load(path), module.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} must be a plain state dict, such as weights.pt of pretrain.py")
    fits = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    skipped = {name: value for name, value in weights.items() if name not in fits}
    missing = [name for name in own if name not in fits]
    # The counter of a batch norm, an integer without axes, fits that of any other.
    if not any(value.is_floating_point() for value in fits.values()):
        raise ValueError(
            f"{path} holds no weights that fit: it holds {shapes(weights)[:3]}, the network has {shapes(own)[:3]}"
        )
    module.load_state_dict(fits, strict=False)
    lines = [
        f"loaded {len(fits)}: {', '.join(modules(fits))}",
        f"skipped {len(skipped)}: {', '.join(shapes(skipped)) or 'nothing'}",
        f"missing {len(missing)}: {', '.join(modules(missing)) or 'nothing'}",
    ]
    return "\n  ".join([f"{path}:", *lines])


def shapes(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {tuple(value.shape)}" for name, value in tensors.items()]


def modules(names: Iterable[str]) -> list[str]:
    """The modules that tensors belong to, to a depth of three names."""
    return list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
