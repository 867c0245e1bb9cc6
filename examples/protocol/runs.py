"""What finetune.py wrote, read again: the options of a run, and its network with the weights."""

import argparse
from pathlib import Path
from typing import NamedTuple

from torch import nn

from examples.protocol import finetune
from examples.protocol.files import load, read_json
from examples.protocol.networks import build_model
from examples.protocol.recipes import parse


class Run(NamedTuple):
    """A network, the options that it was trained with, and the axes of the volumes that it was trained on, if known."""

    options: argparse.Namespace
    model: nn.Module
    axes: str | None


def read_run(weights: Path) -> Run:
    """The run that a file of weights belongs to, by the result.json beside it."""
    path = weights.parent / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"{weights} has no result.json beside it, is it of a finetune.py that is done?")
    result = read_json(path)
    # What an older run did not know has its default.
    options = parse(finetune.parser(), ["--preset", result["settings"]["preset"], "--output", str(weights.parent)])
    options = argparse.Namespace(**(vars(options) | result["settings"]))
    model = build_model(options)
    try:
        model.load_state_dict(load(weights))
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{weights} are not the weights of the network of {path}: {reason}") from error
    return Run(options, model.eval(), result.get("axes"))
