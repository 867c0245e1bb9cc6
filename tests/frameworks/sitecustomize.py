"""Python runs this as it starts: frameworks import torchvision by themselves, which needs help beside a CPU torch."""

import importlib
import sys
from typing import Any


class _BeforeTorchvision:
    """Declares torchvision's operators just before it is imported for the first time."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG002
        if name == "torchvision":
            sys.meta_path.remove(self)
            importlib.import_module("examples.torchvision_operators")


sys.meta_path.insert(0, _BeforeTorchvision())
