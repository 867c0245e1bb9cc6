"""Files that are written at once or not at all, and whose name is in the message when they cannot be read."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Lets ``writer`` write a temporary file, which then takes the file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    writer(temporary)
    os.replace(temporary, path)


def write_json(content: Any, path: Path) -> None:
    write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def save(content: Any, path: Path) -> None:
    """Writes tensors, numbers and texts: the same bytes for the same content, whatever the file's name."""

    def writer(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, torch would put it into the file
            torch.save(content, file)

    write(path, writer)


def load(path: Path) -> Any:
    """Reads a file of plain tensors, numbers and texts."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
