"""The examples for GitHub and GitLab: they fit the schemas, and their commands work."""

import re
import shlex
import subprocess
import sys

from support.project import PROJECT, Project

import pytest
import yaml

CI = PROJECT / "examples/ci"


def read_commands(name: str) -> list[str]:
    """Return the commands of an example that run programs of this project."""
    return re.findall(r"- (?:run: )?(python \w+\.py .*)", (CI / name).read_text())


@pytest.mark.parametrize(("name", "schema"), [("github.yml", "github-workflows"), ("gitlab.yml", "gitlab-ci")])
def test_example_fits_the_schema(name, schema):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(CI / name)]
    end = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert end.returncode == 0, end.stdout
    assert yaml.safe_load((CI / name).read_text())


@pytest.mark.slow
def test_commands_of_the_examples_work(tmp_path, photos, prefect):
    commands = read_commands("github.yml")
    assert len(commands) == 2
    assert read_commands("gitlab.yml") == commands
    project = Project(tmp_path)
    for name in ("ml_workflow.py", "predict.py", "workflow"):
        (project.folder / name).symlink_to(PROJECT / name)
    for name in ("photos", "kept"):
        (project.folder / name).symlink_to(photos)
    for command in commands:
        end = project.execute(shlex.split(command), **prefect)
        assert end.returncode == 0, end.stderr
