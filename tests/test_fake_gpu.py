"""A rehearsal for a GPU without one, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(torch._C, "_acc"), reason="this PyTorch takes no devices from Python")
def test_everything_stays_on_the_device_and_waits_for_no_value():
    command = [sys.executable, "-W", "error", "tests/fake_gpu.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("passed") == 9
