"""Doctests read as a user would type them, with torch at hand; torchvision imports beside a CPU torch."""

import importlib

import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["torch"] = torch
    torch.manual_seed(0)


def _import_torchvision() -> torch.library.Library | None:
    """PyPI's torchvision has CUDA operators, which do not load beside a CPU torch: it then misses two as it starts.

    Declared without code they suffice, since no backbone here runs them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_OPERATORS = _import_torchvision()  # declared as long as this is held
