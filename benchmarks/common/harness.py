"""What the benchmarks share: their options, alternating runs, medians, saved bytes, FLOPs, tables with versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "benchmarks" / "results"  # what the README and the site show
RESULTS = Path(os.environ.get("RESULTS", ROOT / "outputs" / "benchmarks"))  # where tables go, unless --publish is given
Run = Callable[[], object]
Row = dict[str, object]


class Publish(argparse.Action):
    """Saves in the folder of published results."""

    def __call__(self, *_: object) -> None:
        global RESULTS
        RESULTS = PUBLISHED


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and keeps the description's lines."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks."""
    made = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    made.add_argument(
        "--publish",
        action=Publish,
        nargs=0,
        default=argparse.SUPPRESS,
        help="save in benchmarks/results, which the README and the site show, and not in outputs/benchmarks",
    )
    return made


def compare(runs: dict[str, Run], *, repeats: int = 11, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each run; the runs alternate, so that a noisy machine is noisy to all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warmup, repeats):
        for name, run in runs.items():
            elapsed = _cuda_seconds(run) if torch.cuda.is_available() else _cpu_seconds(run)
            if repeat >= 0:
                seconds[name].append(elapsed)
    return {name: median(values) for name, values in seconds.items()}


def _cpu_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Run) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def saved_bytes(run: Run, *, aside: Iterable[Tensor] = ()) -> int:
    """Bytes that the forward pass saves for the backward pass: unique storages, parameters and ``aside`` not counted.

    ``aside`` holds what is there anyway, such as the inputs.
    """
    excluded = {tensor.untyped_storage() for tensor in aside}
    storages: set[torch.UntypedStorage] = set()  # kept alive, so that no two are taken for one

    def pack(tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base  # a linear layer saves a view of its weight
        if not isinstance(owner, nn.Parameter):
            storages.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in storages - excluded)


def count_flops(run: Run) -> int:
    """FLOPs, a multiply-add being 2, under the MATH attention backend (the fused CPU kernel would count as zero)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def device_name() -> str:
    """The name of the GPU, or of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def environment(*packages: str) -> dict[str, str]:
    """The device's name and the versions of Python, torch and the packages named."""
    versions = {name: _version(name) for name in ("torch", *packages)}
    return {"device": device_name(), "python": platform.python_version(), **versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def markdown(rows: list[Row]) -> str:
    """A Markdown table; the first row's keys are the header."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([_cell(row[key]) for key in header] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def report(name: str, rows: Iterable[Row], *, notes: str, packages: Iterable[str] = (), measured: bool = True) -> str:
    """Saves a table with its notes and versions, as Markdown and JSON under RESULTS, after each row; then prints it.

    What is ``measured`` bears the device's name; what is counted is the same on every device.
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
    print(f"{text}\nSaved as {path}.md and .json" if done else f"{name}: nothing to measure", flush=True)
    return text
