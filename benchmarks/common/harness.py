"""What every benchmark begins and ends with: its options, and a table with notes and versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from examples.protocol.options.console import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "benchmarks" / "results"  # what the README and the site show
RESULTS = Path(os.environ.get("RESULTS", ROOT / "outputs" / "benchmarks"))  # where tables go without --publish
Row = dict[str, object]


class Publish(argparse.Action):
    """Saves in the folder of published results."""

    def __call__(self, *_: object) -> None:
        global RESULTS
        RESULTS = PUBLISHED


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    made.add_argument(
        "--publish",
        action=Publish,
        nargs=0,
        default=argparse.SUPPRESS,
        help="save in benchmarks/results, which the README and the site show, instead of outputs/benchmarks",
    )
    return made


def device_name() -> str:
    """Returns the name of the GPU, or of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def environment(*packages: str) -> dict[str, str]:
    """Returns the device's name and the versions of Python, torch and the given packages."""
    versions = {name: _version(name) for name in ("torch", *packages)}
    return {"device": device_name(), "python": platform.python_version(), **versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def markdown(rows: list[Row]) -> str:
    """Returns a Markdown table. The keys of the first row are its header."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([_cell(row[key]) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def report(name: str, rows: Iterable[Row], *, notes: str, packages: Iterable[str] = (), measured: bool = True) -> str:
    """Saves a table with its notes and versions as Markdown and JSON after each row, and prints it at the end.

    Args:
        name: of the files in RESULTS.
        rows: of the table. They may come from a generator that measures.
        notes: a text that says what the numbers mean.
        packages: whose versions are recorded, besides torch's.
        measured: whether the numbers depend on the device. Then the table and the name of its files say which it was.
    """
    where = environment(*packages)
    if not measured:
        del where["device"]
    versions = ", ".join(f"{key} {value}" for key, value in where.items())
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    path = RESULTS / (f"{name}-{device}" if measured else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    done: list[Row] = []
    text = ""
    for row in rows:
        done.append(row)
        text = f"{markdown(done)}\n\n{notes}\n\n{versions}\n"
        content = {"environment": where, "notes": notes, "rows": done}
        Path(f"{path}.json").write_text(json.dumps(content, indent=1) + "\n")
        Path(f"{path}.md").write_text(text)
    print(f"{text}\nSaved as {path}.md and .json" if done else f"{name}: there was nothing to measure", flush=True)
    return text
