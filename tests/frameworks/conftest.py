"""Needs the environment of `make frameworks`; elsewhere these tests are skipped."""

from importlib.util import find_spec

import pytest

collect_ignore = ["sitecustomize.py"]  # Python itself has run it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("nnunetv2", "lightning", "transformers", "ignite") if find_spec(name) is None]
    for item in items:
        if missing and "frameworks" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)} not installed: run make frameworks"))
