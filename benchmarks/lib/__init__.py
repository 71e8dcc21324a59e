"""What the benchmarks share. Importing anything from here makes the project's own files importable."""

import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "sample_images")]
