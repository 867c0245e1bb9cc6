"""Reads a run of fine-tuning: its options, and its network with the weights."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from examples.protocol.files import load, read_json
from examples.protocol.models.networks import build_model
from examples.protocol.options import FinetuneOptions, read_settings


class Run(NamedTuple):
    """A network and how it was trained."""

    weights: Path
    options: FinetuneOptions
    model: nn.Module
    axes: str | None  # of the volumes that it was trained on, if known
    subjects: dict[str, list[str]]  # those of "train" and "test"


def read_run(weights: Path) -> Run:
    """The run that a file of weights belongs to, by the result.json beside it."""
    path = weights.parent / "result.json"
    if not path.is_file():
        raise FileNotFoundError(f"{weights} has no result.json next to it: is it from a finished run of finetune.py?")
    result: dict[str, Any] = read_json(path)
    options = read_settings(FinetuneOptions, result["settings"], output=weights.parent)
    model = build_model(options)
    try:
        model.load_state_dict(load(weights))
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{weights} are not the weights of the network of {path}: {reason}") from error
    return Run(weights, options, model.eval(), result.get("axes"), result["settings"]["subjects"])
