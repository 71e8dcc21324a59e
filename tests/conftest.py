"""Shared fixtures, and the fault matrix that pytest prints at the end."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import draw
from support.images import ImageServer, closing_server
from support.project import Project, free_port
from workflow import cli

import mlflow
import numpy as np
import pytest
from filelock import FileLock

HEIC_ARCHIVE = Path(__file__).parent / "support" / "heic.zip"


def pytest_collection_modifyitems(items):
    """Attach the faults named by the markers `survived` and `refused` to the reports of their tests."""
    for item in items:
        for marker in item.iter_markers():
            if marker.name in ("survived", "refused"):
                item.user_properties += [(marker.name, name) for name in marker.args]


def pytest_terminal_summary(terminalreporter):
    """Print the fault matrix: each tested fault and its outcome."""
    rows = {
        name: outcome if report.passed else report.outcome
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call" or getattr(report, "outcome", None) in ("failed", "skipped")
        for outcome, name in getattr(report, "user_properties", ())  # missing if a file fails to import
    }
    if rows:
        terminalreporter.section("fault matrix")
        for name, outcome in sorted(rows.items()):
            terminalreporter.line(f"{outcome:9} {name}")
        terminalreporter.line(
            ", ".join([f"{len(rows)} faults", *(f"{n} {o}" for o, n in Counter(rows.values()).items())])
        )


@pytest.fixture(autouse=True)
def no_forced_exit(monkeypatch):
    """Disable the timer that ends a program's process: for tests that call main(), that is pytest's process."""
    monkeypatch.setattr(cli, "exit_within", lambda *_: None)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Synthetic images with the file names of the lab's; some .jpeg files contain PNGs, as in the lab's data set."""
    folder = tmp_path_factory.mktemp("photos")
    for kind in ("apples", "oranges"):
        (folder / kind).mkdir()
        for number in range(1, 11):
            image = draw.draw(kind, 160, np.random.default_rng([4, len(kind), number]))
            image.save(folder / kind / f"{kind[:-1]}-{number}.jpeg", "PNG" if number > 7 else "JPEG")
    return folder


@pytest.fixture(scope="session")
def heic_photos(tmp_path_factory) -> Path:
    """Synthetic images in HEIC format, with EXIF data; made with heif-enc, because pi-heif cannot write them."""
    folder = tmp_path_factory.mktemp("heic")
    shutil.unpack_archive(HEIC_ARCHIVE, folder)
    return folder


@pytest.fixture
def image_server(photos):
    with closing_server(ImageServer(photos)) as server:
        yield server


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """The folder of this test run, which its worker processes share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def databases(shared) -> Path:
    """A state folder with empty databases; copying them is much faster than creating their tables."""
    folder = shared / "databases" / "state"
    with FileLock(shared / "databases.lock"):
        if not folder.exists():
            project = Project(folder.parent)
            with project.prefect_server():
                mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder


@pytest.fixture
def tracking_uri(tmp_path, databases) -> str:
    """The URI of an empty MLflow database, set as the tracking URI."""
    uri = f"sqlite:///{shutil.copy(databases / 'mlflow.db', tmp_path)}"
    mlflow.set_tracking_uri(uri)
    return uri


@pytest.fixture
def project(tmp_path, databases) -> Project:
    return Project(tmp_path, databases)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a 64 MB disk."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs permission to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory, databases):
    """The address of a shared Prefect server, as an environment variable."""
    with Project(tmp_path_factory.mktemp("prefect"), databases).prefect_server() as url:
        yield {"PREFECT_API_URL": url}


@pytest.fixture(scope="session")
def trained(shared, photos, prefect, databases) -> Project:
    """A project with a champion and no servers, which all worker processes use."""
    project = Project(shared / "trained", databases)
    with FileLock(shared / "trained.lock"):
        if not (project.folder / "mlartifacts").exists():
            end = project.run("--source", str(photos), **prefect)
            assert end.returncode == 0, end.stderr
    return project


@pytest.fixture
def unused_port() -> int:
    return free_port()
