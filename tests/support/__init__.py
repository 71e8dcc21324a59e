"""Helpers for the tests: projects with isolated state, servers, images and models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # for make_docs.py, which runs without pytest
