"""Doctests read as a user would type them, with torch at hand; torchvision imports beside a CPU torch; --device."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import examples.torchvision_operators  # noqa: F401  # as the examples do


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)


@pytest.fixture
def on_device(pytestconfig: pytest.Config) -> Iterator[None]:
    """Makes tensors and modules on the device of ``--device``, unless they say otherwise."""
    device = pytestconfig.getoption("device")
    with nullcontext() if device == "cpu" else torch.device(device):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where tests run that can run anywhere."""
    parser.addoption(
        "--device",
        default="cpu",
        help="where laws, fuzz, toolchain, SIFT, losses and attach run: cpu, cuda, mps; laws: meta too",
    )
    parser.addoption("--dtype", default="float64", choices=["float64", "float32"], help="of the laws")


def pytest_configure(config: pytest.Config) -> None:
    """Tells the tests, in ``common.TARGET``."""
    from common import TARGET  # of tests/, which pytest puts on the path

    TARGET.device, TARGET.dtype = config.getoption("device"), getattr(torch, config.getoption("dtype"))
