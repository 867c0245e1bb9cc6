"""Files that are written completely or not at all. Errors name the file."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Reserves a folder for one run, and removes the unfinished files of a run that was killed.

    If the run fails before it has written anything, the folders that were made for it are removed.

    Raises:
        ValueError: if another run is writing there. A run that was killed does not count.
        OSError: if the folder cannot be written.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is writing in {folder}: wait for its end, or choose another --output") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be written, choose another --output: {error}") from error
    try:
        for path in folder.iterdir():
            if re.fullmatch(r".+\.\d+\.tmp", path.name):
                path.unlink()
        yield
    except BaseException:
        lock.release()
        remove_empty(made)
        raise
    lock.release()


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, each inside the next one, as long as they are empty except for a lock."""
    with suppress(OSError):  # another run may be writing there by now
        for folder in folders:
            if any(path.name != ".lock" for path in folder.iterdir()):
                return
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Lets ``writer`` write a temporary file, which then takes the file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written, what it held is still there: {error}") from error


def write_json(content: Any, path: Path) -> None:
    write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def save(content: Any, path: Path) -> None:
    """Writes tensors, numbers and texts. The same content gives the same bytes, whatever the file's name."""
    import torch  # here, since the commands read JSON before they load torch, which takes seconds

    def writer(temporary: Path) -> None:
        with temporary.open("wb") as file:  # torch would write a name that it is given into the file
            torch.save(content, file)

    write(path, writer)


def load(path: Path) -> Any:
    """Reads a file of plain tensors, numbers and texts. Code in the file is not run."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other things than plain tensors, such as code, and was not run: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
