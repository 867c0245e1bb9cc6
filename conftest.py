"""Doctests read as a user would type them, with torch at hand; torchvision imports beside a CPU torch."""

import pytest
import torch

import examples.torchvision_operators  # noqa: F401  # as the examples do


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)
