"""``python benchmarks/flops.py`` runs ``python -m benchmarks.cost.flops``."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
runpy.run_module("benchmarks.cost.flops", run_name="__main__", alter_sys=True)
