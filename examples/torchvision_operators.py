"""Import this before torchvision, or a library that imports it, where torch is a CPU build.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its operators do not load, and ``import torchvision``
ends with "operator torchvision::nms does not exist". This module then declares the two operators that the import looks
for. They get no code: they suppress overlapping boxes, which no network here does. Anywhere else it changes nothing.
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


_OPERATORS = _declare()  # they are declared for as long as this is held
