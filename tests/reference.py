"""The authors' numbers in ``../shared/reference``, and the weights that its README's formula gives."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not FOLDER.exists(), reason=f"the authors' numbers are not at {FOLDER}")


def numbers() -> dict[str, Tensor]:
    with np.load(FOLDER / "authors_reference.npz") as file:
        return {name: torch.tensor(file[name]) for name in file}


def state_dict(module: str) -> dict[str, Tensor]:
    """The authors' state dict of "kaf_layer", "kaf_unet", "unet" or "matcher"."""
    shapes = json.loads((FOLDER / "authors_reference.keys.json").read_text())[module]
    return {
        name: torch.from_numpy(np.asarray(_weight(name, shape), dtype=np.float32)) for name, shape in shapes.items()
    }


def _weight(name: str, shape: list[int]) -> np.ndarray | float:
    generator = np.random.default_rng([20231001, zlib.crc32(name.encode())])
    if name.endswith("num_batches_tracked"):
        return 0.0
    if not shape:
        return 1.0
    normal = generator.standard_normal(shape)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(normal)
    if len(shape) > 1:
        return normal / np.sqrt(np.prod(shape[1:]))
    return 0.1 * normal + (1 if name.endswith("weight") else 0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
