"""These tests run where ``pytest --device`` says: tensors and modules are made there unless they say otherwise."""

from collections.abc import Iterator

import pytest
import torch
from common import TARGET


@pytest.fixture(autouse=True)
def _default_device() -> Iterator[None]:
    with torch.device(TARGET.device):
        yield
