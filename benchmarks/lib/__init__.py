"""Helpers for the benchmarks. Importing this package makes the modules of the project importable."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "sample_images")]
