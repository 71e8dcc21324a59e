"""The fixtures that all tests share, and the fault matrix that a run of the tests prints."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import draw
from support.images import ImageServer, closing_server
from support.project import Project, free_port

import mlflow
import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """Each row of the fault matrix, named by the markers survived and refused, goes with its test's report."""
    for item in items:
        for marker in item.iter_markers():
            if marker.name in ("survived", "refused"):
                item.user_properties += [(marker.name, name) for name in marker.args]


def pytest_terminal_summary(terminalreporter):
    """The fault matrix: each fault that was brought about, and what came of it."""
    rows = {
        name: outcome if report.passed else report.outcome
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call" or getattr(report, "outcome", None) in ("failed", "skipped")
        for outcome, name in getattr(report, "user_properties", ())  # none when a file cannot be read
    }
    if rows:
        terminalreporter.section("fault matrix")
        for name, outcome in sorted(rows.items()):
            terminalreporter.line(f"{outcome:9} {name}")
        terminalreporter.line(
            ", ".join([f"{len(rows)} faults", *(f"{n} {o}" for o, n in Counter(rows.values()).items())])
        )


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A drawn data set under the lab's names; as in the lab's, some of the .jpeg files are PNGs inside."""
    folder = tmp_path_factory.mktemp("photos")
    for kind in ("apples", "oranges"):
        (folder / kind).mkdir()
        for number in range(1, 11):
            image = draw.draw(kind, 160, np.random.default_rng([4, len(kind), number]))
            image.save(folder / kind / f"{kind[:-1]}-{number}.jpeg", "PNG" if number > 7 else "JPEG")
    return folder


@pytest.fixture
def image_server(photos):
    with closing_server(ImageServer(photos)) as server:
        yield server


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """A database of MLflow without an entry: to make its tables takes seconds, to copy it takes none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(tmp_path, empty_database) -> str:
    """The address of a database of MLflow for one test, which is the one that MLflow uses."""
    uri = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    mlflow.set_tracking_uri(uri)
    return uri


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    """A Prefect server for all that do not test Prefect: its address, as a setting."""
    with Project(tmp_path_factory.mktemp("prefect")).prefect_server() as url:
        yield {"PREFECT_API_URL": url}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos, prefect) -> Project:
    """The programs with a champion, and no server."""
    project = Project(tmp_path_factory.mktemp("trained"))
    end = project.run("--source", str(photos), **prefect)
    assert "was promoted to champion" in end.stdout, end.stderr
    return project


@pytest.fixture
def unused_port() -> int:
    return free_port()
