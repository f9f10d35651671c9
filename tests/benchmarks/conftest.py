"""Benchmarks are scripts in a folder of their own; their tests import them as Python does when it runs one."""

import sys
from pathlib import Path

# At the end: benchmarks/probes.py must not hide the package of that name.
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS), str(BENCHMARKS / "organisms")]
