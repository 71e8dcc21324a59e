"""The lock: every installed package is locked, and the packages work together."""

import re
import subprocess
import sys
from importlib.metadata import distribution

from support.project import PROJECT

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements(path: str) -> list[Requirement]:
    lines = re.findall(r"^[A-Za-z].*$", (PROJECT / path).read_text(), re.MULTILINE)
    return [Requirement(line.split(" #")[0]) for line in lines]


def test_every_required_package_is_installed_as_locked():
    locked = {}
    for pin in requirements("constraints.txt"):
        if pin.marker is None or pin.marker.evaluate():
            (version,) = pin.specifier
            locked[canonicalize_name(pin.name)] = version.version
    pending = requirements("requirements.txt") + requirements("tests/requirements.txt")
    seen = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        installed = distribution(name)
        assert locked.get(name) == installed.version, name
        for text in installed.requires or []:
            dependency = Requirement(text)
            extras = [{"extra": extra} for extra in ("", *requirement.extras)]
            if dependency.marker is None or any(dependency.marker.evaluate(extra) for extra in extras):
                pending.append(dependency)
    assert len(seen) > 150


def test_installed_packages_are_compatible():
    end = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert end.returncode == 0, end.stdout


def test_files_that_the_ci_workflow_names_exist():
    files = re.findall(r"tests/[\w/.]+", (PROJECT / ".github/workflows/ci.yml").read_text())
    assert all((PROJECT / file).exists() for file in files)
