"""What the tests share: seeded keypoints with every difficulty in them, and the laws every module obeys."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kaf_layer import Keypoints

NAN = float("nan")


@dataclass
class Target:
    """Where tests run that can run anywhere, as ``pytest --device cuda --dtype float32`` says."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.dtype == torch.float64 else 1e-3


TARGET = Target()


# Elsewhere checks of values would wait for the device; compiled ones end the process.
checks_values = pytest.mark.skipif("config.getoption('device') != 'cpu'", reason="values are checked on a CPU only")


def generator(seed: int) -> torch.Generator:
    """Of random numbers on the device of the tests."""
    return torch.Generator("cpu" if TARGET.device == "meta" else TARGET.device).manual_seed(seed)


def random_keypoints(
    image_size: tuple[int, ...],
    counts: tuple[int, ...] = (7, 0, 4),
    *,
    slots: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    garbage: float = NAN,
) -> Keypoints:
    """Keypoints in random slots, some sharing a cell, some on the border; ``garbage`` in the others."""
    slots = max(counts) + 2 if slots is None else slots
    with torch.device("cpu"):  # the same ones on any device
        draws = torch.Generator().manual_seed(seed)
        size = torch.tensor(image_size[::-1], dtype=dtype)
        positions = torch.rand(len(counts), slots, len(image_size), generator=draws, dtype=dtype) * size - 0.5
        positions[:, 1::3] = positions[:, 0::3][:, : positions[:, 1::3].shape[1]]  # shared cells
        positions[:, 2::5] = size - 1  # the last corner
        order = torch.rand(len(counts), slots, generator=draws).argsort(dim=1)
        valid = order.argsort(dim=1) < torch.tensor(counts)[:, None]
        keypoints = Keypoints(positions.masked_fill(~valid[..., None], garbage), valid, image_size)
    return keypoints.to(torch.get_default_device())


def leave_group(folder: str | Path) -> None:
    """Ends a process of a group once all have come here.

    Without destructors: gloo's may wait forever for a process that has left already.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    Path(folder, f"done-{rank}").touch()
    while not all(Path(folder, f"done-{other}").exists() for other in range(world)):
        time.sleep(0.05)
    os._exit(0)


def fill_padding(values: Tensor, keypoints: Keypoints, garbage: float = NAN) -> Tensor:
    """``values`` (B, N, C) with ``garbage`` in the slots that are not valid."""
    return values.masked_fill(~keypoints.valid[..., None], garbage)


def holds(mask: Tensor) -> bool:
    """Whether all of a mask is true; of shapes without values nothing is asked."""
    return mask.device.type == "meta" or bool(mask.all())
