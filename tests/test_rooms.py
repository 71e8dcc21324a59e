"""The rooms of workflow/: which may import which, and what all of them may import without waiting."""

import ast
import subprocess
import sys
from pathlib import Path

from support.project import PROJECT

import pytest

BASE = {"errors", "files", "names", "records", "settings"}
BELOW = {  # what a room may import besides itself and BASE
    "model": set(),
    "images": {"model"},
    "judging": {"images", "model"},
    "running": set(),
    "delivery": {"images", "judging", "model"},
}
HEAVY = {"dask", "distributed", "keras", "matplotlib", "mlflow", "numpy", "PIL", "prefect", "tensorflow"}


def imported(path: Path) -> set[str]:
    """The rooms, or files of BASE, that a file imports from workflow."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "workflow":
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("room", BELOW)
def test_arrows_between_rooms_go_one_way(room):
    files = list((PROJECT / "workflow" / room).glob("*.py"))
    assert len(files) > (4 if room == "delivery" else 5)
    for path in files:
        assert imported(path) <= {room} | BASE | BELOW[room], path


def test_files_of_all_rooms_import_no_room():
    for name in BASE:
        assert imported(PROJECT / "workflow" / f"{name}.py") <= BASE


@pytest.mark.parametrize("name", sorted(BASE))
def test_files_of_all_rooms_import_nothing_heavy(name):
    program = f"import sys, workflow.{name}; print(*{HEAVY!r} & {{module.split('.')[0] for module in sys.modules}})"
    end = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert (end.returncode, end.stdout.strip()) == (0, ""), end.stderr


def test_code_that_is_logged_with_each_model_imports_nothing_of_ours():
    assert imported(PROJECT / "workflow/model/image_classifier.py") == set()
