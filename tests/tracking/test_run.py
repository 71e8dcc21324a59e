"""The MLflow run of a flow run: its status at the end, and errors of its store."""

import os
import subprocess

from support.project import run_together
from workflow.errors import WorkflowError
from workflow.tracking import run as run_module
from workflow.tracking.connection import connect_mlflow, describe_mlflow_command
from workflow.tracking.logging import check_logged_epochs
from workflow.tracking.run import mlflow_run

import mlflow
import pytest

NO_SERVER = "http://127.0.0.1:1"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A tracking database in an empty folder, and a flow run in Prefect's runtime context."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in {"ID": "1", "NAME": "name", "UI_URL": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(f"PREFECT__RUNTIME__FLOW_RUN__{name}", value)
    for name in run_module.SHORT_TIMEOUT:
        monkeypatch.setenv(name, os.environ[name])  # which a failed run changes
    connect_mlflow(NO_SERVER, tmp_path, "test")
    return tmp_path


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_run_ends_with_the_status_of_its_block(store, error, status):
    assert "mlflow server" in describe_mlflow_command()
    scratch = None
    try:
        with mlflow_run(store / "models") as run:
            scratch = store / "models" / run.info.run_id
            scratch.mkdir(parents=True)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt, SystemExit):
        pass
    assert mlflow.get_run(run.info.run_id).info.status == status
    assert mlflow.active_run() is None
    assert not scratch.exists()


def test_unreachable_mlflow_does_not_hide_the_error_of_a_run(store, monkeypatch):
    def fail(*_, **__):
        raise mlflow.exceptions.MlflowException("MLflow is away")

    with pytest.raises(ValueError, match="bad"), mlflow_run(store / "models") as run:  # noqa: PT012
        monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", fail)
        raise ValueError("bad")
    monkeypatch.undo()
    assert mlflow.active_run() is None  # otherwise MLflow would set it to FINISHED when the process exits
    assert mlflow.get_run(run.info.run_id).info.status == "RUNNING"


@pytest.mark.slow
@pytest.mark.refused("MLflow: the experiment was deleted in the UI")
def test_deleted_experiment_is_refused_with_restore_command(store, monkeypatch):
    client = mlflow.MlflowClient()
    client.delete_experiment(client.get_experiment_by_name("test").experiment_id)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(WorkflowError, match="experiment test was deleted") as error:
        connect_mlflow(NO_SERVER, store, "test")
    subprocess.run(["bash", "-c", str(error.value).partition(": ")[2]], check=True, capture_output=True)
    connect_mlflow(NO_SERVER, store, "test")


@pytest.mark.survived("MLflow: the experiment was renamed in the UI")
def test_renamed_experiment_is_left_alone(store, monkeypatch):
    client = mlflow.MlflowClient()
    with mlflow_run(store / "models") as run:
        mlflow.log_text("content", "file.txt")
    client.rename_experiment(run.info.experiment_id, "other")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect_mlflow(NO_SERVER, store, "test")
    with mlflow_run(store / "models") as second:
        mlflow.log_text("content", "file.txt")
    assert second.info.experiment_id != run.info.experiment_id
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/file.txt") == "content"


@pytest.mark.refused("MLflow: the run was deleted in the UI while it was in progress")
def test_run_that_is_deleted_in_progress_fails_in_one_line(store):
    with pytest.raises(WorkflowError, match=r"deleted.*repeat the command"), mlflow_run(store / "models") as run:  # noqa: PT012
        mlflow.MlflowClient().delete_run(run.info.run_id)
        mlflow.log_metric("loss", 1)
    assert mlflow.active_run() is None


@pytest.mark.parametrize("end", ["FINISHED", "FAILED", "deleted", "in progress", "missing"])
@pytest.mark.refused("MLflow: MLFLOW_RUN_ID names another run")
def test_run_id_of_another_run_is_refused(store, monkeypatch, end):
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("test").experiment_id
    run_id = client.create_run(experiment, tags={"prefect_flow_run": "2"} if end == "in progress" else {}).info.run_id
    if end in ("FINISHED", "FAILED"):
        client.set_terminated(run_id, end)
    if end == "deleted":
        client.delete_run(run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32 if end == "missing" else run_id)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = client.get_run(run_id)
    with pytest.raises(WorkflowError, match=r"MLFLOW_RUN_ID.*unset"):
        connect_mlflow(NO_SERVER, store, "test")
    with pytest.raises(WorkflowError, match=r"MLFLOW_RUN_ID.*unset"), mlflow_run(store / "models"):
        pass
    after = client.get_run(run_id)
    assert (after.info.status, after.data.tags) == (before.info.status, before.data.tags)


def test_new_run_of_mlflow_projects_is_continued(store, monkeypatch):
    client = mlflow.MlflowClient()
    run_id = client.create_run(client.get_experiment_by_name("test").experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    connect_mlflow(NO_SERVER, store, "test")
    with mlflow_run(store / "models") as run:
        assert run.info.run_id == run_id
    other = client.create_run(client.create_experiment("other")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", other)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(WorkflowError, match="--experiment-name test"):
        connect_mlflow(NO_SERVER, store, "test")


def test_lost_metrics_fail_the_run(store):
    with mlflow.start_run() as run:
        for epoch in range(3):
            mlflow.log_metric("loss", 1.0, step=epoch)
    check_logged_epochs(run.info.run_id, 3)
    with pytest.raises(WorkflowError, match="3 of 4 epochs"):
        check_logged_epochs(run.info.run_id, 4)


@pytest.mark.slow
def test_four_first_processes_share_one_intact_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    program = (
        "import os, sys, pathlib, uuid\n"
        "from workflow.tracking.connection import connect_mlflow\n"
        "from workflow.tracking.run import mlflow_run\n"
        "import mlflow\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "os.environ['PREFECT__RUNTIME__FLOW_RUN__ID'] = str(uuid.uuid4())\n"
        f"connect_mlflow('{NO_SERVER}', folder, 'test')\n"
        "with mlflow_run(folder / 'models'): mlflow.log_metric('loss', 1)\n"
    )
    run_together(4, program, tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
