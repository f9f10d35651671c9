"""Benchmarks are scripts in a folder of their own; their tests import them as Python does when it runs one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
