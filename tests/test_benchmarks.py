"""People run the benchmarks by hand; these tests only check that they start and that bare.py trains."""

import subprocess
import sys

from support.project import PROJECT, SECONDS

import pytest

SCRIPTS = [path for path in sorted((PROJECT / "benchmarks").glob("*.py")) if "add_argument(" in path.read_text()]


def execute(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_benchmark_prints_its_help(script):
    end = execute(str(script), "--help")
    assert end.returncode == 0, end.stderr
    assert end.stdout.startswith(f"usage: {script.name}")


@pytest.mark.slow
def test_bare_script_trains_the_same_network():
    options = ("--epochs=1", "--batch-size=8", "--learning-rate=0.03", "--dropout=0.1", "--seed=42")
    end = execute("benchmarks/bare.py", "sample_images", *options)
    assert end.returncode == 0, end.stderr
    assert "'accuracy': " in end.stdout
