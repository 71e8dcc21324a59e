"""Runs that did not end well: each is looked at, classified, and then gone on with, left alone or closed.

A run that has not ended well has a lock file, which is named after its Prefect flow run, as its tag in MLflow is. The
operating system frees the lock when the run's process is gone.
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.orchestration.flow_runs import close_flow_run

import mlflow
from filelock import FileLock, Timeout
from mlflow.entities import Run, ViewType

UNFINISHED = ".unfinished"  # the folder of the locks
CHECKPOINT = "training.npz"  # in the folder of a run: where its training can go on


class State(Enum):
    """What has become of a run whose process is gone."""

    FINISHED = "MLflow has its end, only its process had not ended"
    RESUMABLE = "this command can go on with it"
    KEPT = "it has a checkpoint: the command that started it can go on with it later"
    DEAD = "nothing of it can be used"
    DELETED = "the user has deleted it"


@dataclass(frozen=True)
class Command:
    """What makes two runs the same: the same parameters and code, and the same data."""

    digest: str  # of parameters and code
    digest_data: Callable[[], str]  # reads the data only when a run is found that may be the same

    def is_of(self, run: Run) -> bool:
        if "MLFLOW_RUN_ID" in os.environ:  # `mlflow run` has opened a run of its own, which has to be used
            return False
        if run.data.tags.get("command_digest") != self.digest:
            return False
        if "data_digest" not in run.data.params:  # it has not come so far
            return True
        with suppress(WorkflowError):  # there may be no images any more
            return run.data.params["data_digest"] == self.digest_data()
        return False


def classify(run: Run, checkpoint: Path, command: Command) -> State:
    """The state of a run whose process is gone."""
    has_checkpoint = zipfile.is_zipfile(checkpoint)
    if run.info.lifecycle_stage != "active":
        return State.DELETED
    if run.info.status == "FINISHED":
        return State.FINISHED
    if command.is_of(run) and (has_checkpoint or "loss" not in run.data.metrics):  # else epochs would be logged twice
        return State.RESUMABLE
    return State.KEPT if has_checkpoint else State.DEAD


def recover(folder: Path, command: Command) -> tuple[str, Path] | None:
    """The id and the lock file of the run to go on with, if there is one; the other runs that died are closed.

    The lock file has to be removed when the run has another one. Runs whose process lives are left alone.
    """
    resumed = None
    for path in sorted((folder / UNFINISHED).glob("*.lock")):
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:  # its process lives
            continue
        close_flow_run(path.stem, "Crashed", "its process died")
        runs = mlflow.search_runs(
            filter_string=f"tags.prefect_flow_run = '{path.stem}'", run_view_type=ViewType.ALL, output_format="list"
        )
        keep = not runs  # it may be in another MLflow store
        for run in runs:
            checkpoint = folder / run.info.run_id / CHECKPOINT
            state = classify(run, checkpoint, command)
            if state == State.RESUMABLE and resumed is None:
                resumed, keep = (run.info.run_id, path), True
                continue
            if state in (State.KEPT, State.RESUMABLE):
                keep = True
            if state == State.FINISHED:
                checkpoint.unlink(missing_ok=True)
            elif state != State.DELETED and run.info.status == "RUNNING":
                mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
        release(lock, keep)
    return resumed


def release(lock: FileLock, keep: bool) -> None:
    """Frees a lock; its file stays when the run has to be remembered."""
    lock.release()
    if not keep:
        Path(lock.lock_file).unlink(missing_ok=True)
