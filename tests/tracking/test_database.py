"""The tracking database: from another folder, or from another release of MLflow or Prefect."""

import contextlib
import os
import re
import shutil
import sqlite3
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.images import closing_server
from workflow.errors import WorkflowError
from workflow.orchestration import connection as orchestration
from workflow.servers import needs_migration
from workflow.tracking import database
from workflow.tracking.connection import connect_mlflow, database_uri

import mlflow
import prefect
import pytest
from alembic.script import ScriptDirectory
from click.testing import CliRunner
from mlflow.cli import cli

NO_SERVER = "http://127.0.0.1:1"


def connect(folder: Path, experiment: str | None = None, url: str = NO_SERVER) -> None:
    """Connect as a new process does: MLflow stores the tracking URI in the environment."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    connect_mlflow(url, folder, experiment)


@pytest.fixture(autouse=True)
def tracking_variable(monkeypatch):
    """Restore the tracking URI in the environment after a test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


@pytest.fixture
def make_state(tmp_path, databases):
    """Return a function that creates a state folder with a run, a registered version and its files."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        shutil.copy(databases / "mlflow.db", folder)
        connect(folder, "test")
        with mlflow.start_run() as run:
            mlflow.log_text("content", "file.txt")
        client = mlflow.MlflowClient()
        client.create_registered_model("a-b")
        client.create_model_version("a-b", f"{run.info.artifact_uri}/model", run.info.run_id)
        return folder

    return make


def only_run() -> mlflow.entities.Run:
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    return run


def addresses(folder: Path) -> str:
    """Return all rows of the database that contain an address."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        return "\n".join(line for line in connection.iterdump() if "mlartifacts" in line)


@pytest.mark.survived("project: its folder was moved or renamed")
@pytest.mark.parametrize("name", ["b", "with space, ü 'quoted'", "a/inside"])
def test_moved_project_has_its_runs_and_models(make_state, tmp_path, name, capfd):
    old, new = make_state("a"), tmp_path / name
    shutil.move(old, tmp_path / "between")
    new.parent.mkdir(exist_ok=True)
    shutil.move(tmp_path / "between", new)
    connect(new)  # as predict.py does
    assert str(old) in capfd.readouterr().err
    assert mlflow.artifacts.load_text(f"runs:/{only_run().info.run_id}/file.txt") == "content"
    assert new.as_uri() in mlflow.MlflowClient().get_model_version_download_uri("a-b", "1")
    connect(new, "test")
    with mlflow.start_run() as run:
        mlflow.log_text("content", "new.txt")
    assert list(new.rglob(f"{run.info.run_id}/artifacts/new.txt"))
    assert not (old / "mlartifacts").exists()
    assert capfd.readouterr().err.count("moved") == 0


@pytest.mark.survived("project: a copy of its folder, and `mlflow gc`")
@pytest.mark.parametrize("name", ["b", "a/inside"])
def test_garbage_collection_in_a_copy_spares_the_original(make_state, tmp_path, monkeypatch, name):
    original = make_state("a")
    copy = shutil.copytree(original, tmp_path / "between")
    copy = shutil.move(copy, tmp_path / name)
    database.update_addresses(copy / "mlflow.db", copy)
    mlflow.set_tracking_uri(uri := database_uri(copy))
    run_id = only_run().info.run_id
    mlflow.MlflowClient().delete_run(run_id)
    end = CliRunner().invoke(cli, ["gc", "--backend-store-uri", uri, "--tracking-uri", uri])
    assert end.exit_code == 0, end.output
    assert not (copy / "mlartifacts" / run_id / "artifacts/file.txt").exists()
    assert (original / "mlartifacts" / run_id / "artifacts/file.txt").exists()
    assert str(copy) not in addresses(original)


@pytest.mark.survived("project: the first run was made by `mlflow run`, and the folder was moved")
def test_moved_folder_with_default_artifacts_is_recognized(make_state, tmp_path, monkeypatch):
    old = make_state("a")
    monkeypatch.chdir(old)
    mlflow.create_experiment("by mlflow run", artifact_location=str(old / "mlruns/1"))
    mlflow.create_experiment("elsewhere", artifact_location=str(tmp_path / "elsewhere/mlruns/2"))
    mlflow.set_experiment("by mlflow run")
    with mlflow.start_run():
        mlflow.log_text("content", "file.txt")
    new = Path(shutil.move(old, tmp_path / "b"))
    connect(new, "by mlflow run")
    assert mlflow.get_experiment_by_name("by mlflow run").artifact_location == str(new / "mlruns/1")
    assert mlflow.get_experiment_by_name("elsewhere").artifact_location == str(tmp_path / "elsewhere/mlruns/2")


@pytest.mark.survived("project: reached through a symbolic link")
def test_link_to_a_project_changes_no_address(make_state, tmp_path):
    folder = make_state("a")
    before, link = addresses(folder), tmp_path / "link"
    link.symlink_to(folder)
    connect(link, "test")
    assert addresses(folder) == before


@pytest.mark.refused("project: mlflow.db was copied without its artifacts")
def test_database_without_its_artifacts_is_refused(make_state, tmp_path):
    old, new = make_state("a"), tmp_path / "b"
    new.mkdir()
    shutil.copy(old / "mlflow.db", new)
    with pytest.raises(WorkflowError, match=f"{old / 'mlartifacts'}; copy it to {new}, or create an empty") as error:
        connect(new, "test")
    Path(re.search(r"an empty (\S+)", str(error.value))[1]).mkdir()
    connect(new, "test")
    shutil.copytree(old / "mlartifacts", new / "mlartifacts", dirs_exist_ok=True)
    assert mlflow.artifacts.load_text(f"runs:/{only_run().info.run_id}/file.txt") == "content"


@pytest.mark.slow
@pytest.mark.refused("MLflow: a server that stores artifacts in another project's folder")
def test_server_of_another_project_is_refused(make_state, project, tmp_path):
    shutil.copytree(make_state("a"), project.folder, dirs_exist_ok=True)
    with project.mlflow_server() as url:
        for folder in (project.folder, tmp_path / "other"):
            folder.mkdir(exist_ok=True)
        connect(project.folder, "test", url)  # the server has not been restarted
        with pytest.raises(WorkflowError, match="ML_WORKFLOW_MLFLOW_URL"):
            connect(tmp_path / "other", "test", url)
        shutil.copytree(project.folder, tmp_path / "copy")
        with pytest.raises(WorkflowError, match="ML_WORKFLOW_MLFLOW_URL"):
            connect(tmp_path / "copy", "test", url)


class VersionServer(ThreadingHTTPServer):
    """A server that returns a version at every path."""

    def __init__(self, version: str):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(version.encode())

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.mark.refused("MLflow: a server of another major version")
@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "ML_WORKFLOW_MLFLOW_URL"])
def test_server_of_another_mlflow_is_refused(tmp_path, monkeypatch, variable):
    with closing_server(VersionServer("2.22.5")) as server:
        mlflow.set_tracking_uri(None)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url if variable == "MLFLOW_TRACKING_URI" else "")
        with pytest.raises(WorkflowError, match=rf"2\.22\.5.* {mlflow.__version__}.*set {variable}"):
            connect_mlflow(server.url, tmp_path / "state", "test")
    assert not (tmp_path / "state").exists()


@pytest.mark.refused("Prefect: a server of another major version")
@pytest.mark.parametrize(
    ("version", "fits"),
    [('"2.20.4"', False), ('"4.0.0.dev3"', False), (f'"{prefect.__version__}"', True), ('"3.0.0"', True), ("?", True)],
)
def test_server_of_another_prefect_is_refused(version, fits):
    with closing_server(VersionServer(version)) as server:
        refusal = contextlib.nullcontext() if fits else pytest.raises(WorkflowError, match=prefect.__version__)
        with refusal:
            orchestration.check_prefect_version(f"{server.url}/api", "do that")


def set_revision(file: Path, revision: str | None) -> None:
    """Store the revision of the schema in a new or existing database."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num)")
        connection.execute("DELETE FROM alembic_version")
        connection.execute("INSERT INTO alembic_version VALUES (?)", [revision])


@pytest.mark.parametrize("folder", [database.MIGRATIONS, orchestration.MIGRATIONS], ids=["mlflow", "prefect"])
def test_revision_shows_which_release_wrote_a_database(tmp_path, folder):
    script = ScriptDirectory(str(folder.parent), version_locations=[str(folder)])
    revisions = {path.name: re.search('^revision = "(.+)"', path.read_text(), re.M) for path in folder.glob("*.py")}
    revision_ids = [match[1] for match in revisions.values() if match]
    (head,) = script.get_heads()
    file = tmp_path / "some.db"
    assert not needs_migration(file, "X", "1.0", folder)
    for revision in [*revision_ids, None]:
        set_revision(file, revision)
        assert needs_migration(file, "X", "1.0", folder) == (revision not in (head, None))
    set_revision(file, "f00000000001")
    with pytest.raises(WorkflowError, match=r"some\.db .*1\.0.*ML_WORKFLOW_STATE"):
        needs_migration(file, "X", "1.0", folder)


@pytest.mark.refused("MLflow: the database of a later release")
def test_database_of_a_later_mlflow_is_refused(tmp_path, databases):
    set_revision(Path(shutil.copy(databases / "mlflow.db", tmp_path)), "f00000000001")
    with pytest.raises(WorkflowError, match=f"later version of MLflow than the installed {mlflow.__version__}"):
        connect(tmp_path, "test")


@pytest.mark.refused("Prefect: the database of a later release")
def test_database_of_a_later_prefect_is_refused(tmp_path):
    set_revision(tmp_path / "prefect.db", "f00000000001")
    with (
        pytest.raises(WorkflowError, match=f"later version of Prefect than the installed {prefect.__version__}"),
        orchestration.temporary_prefect_server(tmp_path),
    ):
        pass


@pytest.mark.survived("MLflow: the database of an earlier release")
def test_database_of_an_earlier_mlflow_is_migrated(tmp_path, capfd):
    from alembic import command
    from mlflow.store.db.utils import InitialBase, _get_alembic_config, create_sqlalchemy_engine

    file = tmp_path / "mlflow.db"
    engine = create_sqlalchemy_engine(database_uri(tmp_path))
    InitialBase.metadata.create_all(engine)
    command.upgrade(_get_alembic_config(database_uri(tmp_path)), REVISION_OF_MLFLOW_2)
    engine.dispose()
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (5, 'old', 'active')")
    capfd.readouterr()
    connect(tmp_path, "test")
    assert mlflow.get_experiment_by_name("old").experiment_id == "5"
    (backup,) = tmp_path.glob("mlflow.db.*.bak")
    assert str(backup) in capfd.readouterr().err
    with closing(sqlite3.connect(backup)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (REVISION_OF_MLFLOW_2,)
    connect(tmp_path, "test")
    assert capfd.readouterr().err == ""


REVISION_OF_MLFLOW_2 = "0584bdc529eb"
