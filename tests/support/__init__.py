"""What the tests share: the programs with state of their own, and images."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # for make_docs.py, which is no test
