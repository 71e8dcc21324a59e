"""Environments of their own, for packages that cannot be installed beside this project's."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def make_environment(folder: Path, *packages: str, with_ours: bool = True) -> Path:
    """The Python of a new environment with the packages, and with ours after them; skips the test without the packages.

    Ours are found by a line in a `.pth` file, so that nothing is installed twice.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    end = subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True)
    if end.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed: {end.stderr.strip().splitlines()[-1]}")
    if with_ours:
        place = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
        site = subprocess.run(place, capture_output=True, text=True, check=True).stdout.strip()
        Path(site, "ours.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return python
