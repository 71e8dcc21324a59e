"""The lock of a run: the next run closes runs whose processes died, and only those."""

from workflow.orchestration import flow_runs
from workflow.orchestration.flow_runs import LOCKS, lock_run

import mlflow
import pytest
from filelock import FileLock


@pytest.fixture
def closed(tmp_path, tracking_uri, monkeypatch):
    """The flow runs that were closed in Prefect, which is replaced; and flow run "new" in its runtime context."""
    mlflow.set_experiment("test")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "new")
    flow_run_ids = []
    monkeypatch.setattr(flow_runs, "close_flow_run", lambda flow_run_id, *_: flow_run_ids.append(flow_run_id))
    return flow_run_ids


def start_run(folder, flow_run: str) -> str:
    """Leave a run as a process that is killed leaves it, and return its id."""
    experiment = mlflow.get_experiment_by_name("test").experiment_id
    run = mlflow.MlflowClient().create_run(experiment, tags={"prefect_flow_run": flow_run})
    (folder / run.info.run_id).mkdir(parents=True)
    (folder / LOCKS).mkdir(exist_ok=True)
    (folder / LOCKS / f"{flow_run}.lock").touch()
    return run.info.run_id


def status_of(run_id: str) -> str:
    return mlflow.get_run(run_id).info.status


def test_dead_run_is_closed_and_its_scratch_folder_removed(tmp_path, closed):
    folder = tmp_path / "models"
    dead = start_run(folder, "dead")
    with lock_run(folder):
        assert (status_of(dead), closed) == ("KILLED", ["dead"])
        assert [path.name for path in folder.glob("[!.]*")] == []
        assert [path.name for path in (folder / LOCKS).iterdir()] == ["new.lock"]
    assert list((folder / LOCKS).iterdir()) == []


def test_living_run_is_left_alone(tmp_path, closed):
    folder = tmp_path / "models"
    living = start_run(folder, "living")
    with FileLock(folder / LOCKS / "living.lock"), lock_run(folder):
        assert (status_of(living), closed) == ("RUNNING", [])
        assert (folder / living).exists()


def test_run_of_another_store_and_deleted_run_stop_nothing(tmp_path, closed):
    folder = tmp_path / "models"
    deleted = start_run(folder, "deleted")
    mlflow.delete_run(deleted)
    (folder / LOCKS / "elsewhere.lock").touch()
    with lock_run(folder):
        pass
    assert [path.name for path in (folder / LOCKS).iterdir()] == ["elsewhere.lock"]


def test_failed_run_is_checked_by_the_next_one(tmp_path, closed):
    folder = tmp_path / "models"
    with pytest.raises(ValueError, match="bad"), lock_run(folder):
        raise ValueError("bad")
    assert [path.name for path in (folder / LOCKS).iterdir()] == ["new.lock"]
