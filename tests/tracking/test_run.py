"""The one MLflow run of a flow run: how it ends, and what becomes of runs whose process died."""

import io
import zipfile

from support.project import run_together
from workflow.orchestration import recovery
from workflow.orchestration.recovery import Command, State, classify
from workflow.tracking.connection import command_for_mlflow, connect_mlflow
from workflow.tracking.run import mlflow_run

import mlflow
import pytest
from mlflow.entities import LifecycleStage, Param, Run, RunData, RunInfo, RunTag

NOBODY = "http://127.0.0.1:1"  # where no server listens
COMMAND = Command("c", lambda: "d")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """No MLflow server anywhere, the tracking database in an empty folder, and a flow run for Prefect's runtime."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in {"ID": "1", "NAME": "name", "UI_URL": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(f"PREFECT__RUNTIME__FLOW_RUN__{name}", value)
    monkeypatch.setattr(recovery, "close_flow_run", lambda *_: None)  # Prefect has no part in these tests
    connect_mlflow(NOBODY, tmp_path, "test")
    return tmp_path


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_run_ends_with_the_status_of_its_block(store, error, status):
    assert "mlflow server" in command_for_mlflow()
    run_id = None
    try:
        with mlflow_run(store / "models", COMMAND) as run:
            run_id = run.info.run_id
            if error:
                raise error
    except (ValueError, KeyboardInterrupt, SystemExit):
        pass
    assert mlflow.get_run(run_id).info.status == status
    assert mlflow.active_run() is None


def test_run_that_could_not_be_ended_stays_open_for_the_next_one_to_close(store, monkeypatch):
    def gone(_):
        raise mlflow.exceptions.MlflowException("MLflow is away")

    opened, patch = [], pytest.MonkeyPatch()

    def fail():
        with mlflow_run(store / "models", COMMAND) as run:
            opened.append(run.info.run_id)
            patch.setattr(mlflow, "get_run", gone)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    patch.undo()
    assert mlflow.active_run() is None  # else MLflow would call it FINISHED when the process ends
    assert mlflow.get_run(*opened).info.status == "RUNNING"
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "2")
    with mlflow_run(store / "models", Command("another", lambda: "d")):
        assert mlflow.get_run(*opened).info.status == "KILLED"


def make_run(status: str, digest: str, stage=LifecycleStage.ACTIVE, loss=False, data=None) -> Run:
    info = RunInfo("1", "0", "me", status, 0, 0, stage)
    metrics = [mlflow.entities.Metric("loss", 0.1, 0, 0)] if loss else []
    return Run(info, RunData(metrics, [Param("data_digest", data)] if data else [], [RunTag("command_digest", digest)]))


@pytest.mark.parametrize(
    ("run", "has_checkpoint", "state"),
    [
        (make_run("FINISHED", "c"), True, State.FINISHED),
        (make_run("RUNNING", "c", LifecycleStage.DELETED), True, State.DELETED),
        (make_run("RUNNING", "c"), False, State.RESUMABLE),  # it died before the training
        (make_run("KILLED", "c", data="d"), True, State.RESUMABLE),
        (make_run("FAILED", "c", data="d", loss=True), True, State.RESUMABLE),
        (make_run("RUNNING", "c", data="d", loss=True), False, State.DEAD),  # its epochs would be logged twice
        (make_run("RUNNING", "c", data="other"), True, State.KEPT),
        (make_run("RUNNING", "other", data="d"), True, State.KEPT),
        (make_run("RUNNING", "other"), False, State.DEAD),
    ],
)
def test_run_whose_process_is_gone_is_classified(tmp_path, run, has_checkpoint, state):
    checkpoint = tmp_path / "training.npz"
    if has_checkpoint:
        file = io.BytesIO()
        zipfile.ZipFile(file, "w").close()
        checkpoint.write_bytes(file.getvalue())
    assert classify(run, checkpoint, COMMAND) == state


@pytest.mark.slow
def test_four_first_processes_share_one_sound_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    program = (
        "import os, sys, pathlib, uuid\n"
        "from workflow.tracking.connection import connect_mlflow\n"
        "from workflow.tracking.run import mlflow_run\n"
        "from workflow.orchestration.recovery import Command\n"
        "import mlflow\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "os.environ['PREFECT__RUNTIME__FLOW_RUN__ID'] = str(uuid.uuid4())\n"
        f"connect_mlflow('{NOBODY}', folder, 'test')\n"
        "with mlflow_run(folder / 'models', Command('c', str)): mlflow.log_metric('loss', 1)\n"
    )
    run_together(4, program, tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
