"""``python benchmarks/memory.py`` runs ``python -m benchmarks.cost.memory``."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
runpy.run_module("benchmarks.cost.memory", run_name="__main__", alter_sys=True)
