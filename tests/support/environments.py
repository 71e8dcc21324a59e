"""Virtual environments for packages that conflict with those of this project."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


def make_environment(folder: Path, *packages: str, has_project_packages: bool = True) -> Path:
    """Return the Python of a new environment with the packages, or skip the test if they cannot be installed.

    A `.pth` file makes the packages of this project importable without installing them again.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    end = subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True)
    if end.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed: {end.stderr.strip().splitlines()[-1]}")
    if has_project_packages:
        command = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
        site = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        Path(site, "project.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return python
