"""With a CPU build of torch, import this before torchvision or any library that imports it.

PyPI's torchvision is built for CUDA. With a CPU build of torch its operators do not load, and ``import torchvision``
fails with "operator torchvision::nms does not exist". This module then declares the two operators that the import
needs. They have no code, since no network here suppresses overlapping boxes. In other environments it changes nothing.
"""

import importlib

import torch


def _declare() -> torch.library.Library | None:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            return None
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_OPERATORS = _declare()  # the operators exist as long as this object does
