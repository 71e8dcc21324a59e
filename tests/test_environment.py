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


def test_every_package_below_the_requirements_is_locked_and_installed_as_locked():
    locked = {}
    for pin in requirements("constraints.txt"):
        if pin.marker is None or pin.marker.evaluate():
            (version,) = pin.specifier
            locked[canonicalize_name(pin.name)] = version.version
    waiting = requirements("requirements.txt") + requirements("tests/requirements.txt")
    seen = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        installed = distribution(name)
        assert locked.get(name) == installed.version, name
        for text in installed.requires or []:
            below = Requirement(text)
            extras = [{"extra": extra} for extra in ("", *requirement.extras)]
            if below.marker is None or any(below.marker.evaluate(extra) for extra in extras):
                waiting.append(below)
    assert len(seen) > 150


def test_installed_packages_fit_each_other():
    end = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert end.returncode == 0, end.stdout


def test_prefect_server_can_be_imported():
    command = [sys.executable, "-c", "import prefect.server.api.server"]
    end = subprocess.run(command, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr


def test_ci_runs_the_test_command_of_the_readme_and_files_that_exist():
    readme = (PROJECT / "README.md").read_text()
    (command,) = re.findall(r"^python3 -m venv venv && .*pytest$", readme, re.MULTILINE)
    *install, test = command.split(" && ")
    lines = (PROJECT / ".ci/run").read_text().splitlines()
    start = lines.index(install[0])
    assert lines[start : start + len(install)] == install
    assert lines[-1] == test
    elsewhere = (PROJECT / ".github/workflows/ci.yml").read_text()
    files = re.findall(r"tests/[\w/.]+", elsewhere)
    assert files
    assert all((PROJECT / file).exists() for file in files)
