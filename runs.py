"""The one MLflow run that a flow run keeps, whatever happens: gone on with when it died, closed when nobody does.

A run that has not ended well has a record, a file that is named after its Prefect flow run and holds the id of its
MLflow run; the lock beside it is free when the run's process is gone.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tracking import STORE_ERRORS, WorkflowError, first_line, writing

import mlflow
import requests
from filelock import FileLock, Timeout
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

SAMPLING_SECONDS = 0.5  # between two system metrics: a run is over in seconds
UNFINISHED = ".unfinished"  # the folder of the records of runs that live, died, or can be gone on with
BACKUPS = "training-*.npz"  # in the folder of a run: what it can go on with
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # to end a run that failed


@contextmanager
def mlflow_run(
    folder: Path, backup: Callable[[], str], name: str, tags: dict[str, str], description: str
) -> Iterator[mlflow.ActiveRun]:
    """The one MLflow run of a flow run, with system metrics: FINISHED, FAILED or KILLED as its block ends.

    The run has a folder of its own in `folder`. When an earlier run did not finish and left the file backup() there,
    it is that run that goes on. Runs whose process died are closed.
    """
    mlflow.set_system_metrics_sampling_interval(SAMPLING_SECONDS)
    mlflow.set_system_metrics_samples_before_logging(1)
    with recorded(folder / UNFINISHED / tags["prefect_flow_run"]) as record, storing("mend it and repeat the command"):
        take_over(record, backup)
        earlier = record.read_text() if record.exists() else None
        run = mlflow.start_run(earlier, run_name=name, tags=tags, description=description, log_system_metrics=True)
        status = "KILLED"
        try:
            record.write_text(run.info.run_id)
            yield run
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            end_run(status, folder / run.info.run_id, record)


def end_run(status: str, own: Path, record: Path) -> None:
    """Ends the active MLflow run; the record and the backups stay where there is something to go on with."""
    backups = list(own.glob(BACKUPS))
    if status == "FINISHED":
        mlflow.end_run()
    else:
        if backups:
            print(f"What was trained is kept in {own}: the same command goes on from there", flush=True)
        patience = {name: os.environ[name] for name in IMPATIENT}
        os.environ.update(IMPATIENT)
        try:
            mlflow.end_run(status)
        finally:
            os.environ.update(patience)
    if status == "FINISHED" or not backups:
        for left in (record, *backups):
            left.unlink(missing_ok=True)


@contextmanager
def recorded(record: Path) -> Iterator[Path]:
    """Holds the lock of a run's record, which is not written yet."""
    with writing(record):
        record.parent.mkdir(parents=True, exist_ok=True)
        lock = claim(record)
    try:
        yield record
    finally:
        release(lock, record)


@contextmanager
def storing(remedy: str) -> Iterator[None]:
    """Turns what MLflow's store, or a disk, raises in its block into a WorkflowError with the remedy."""
    try:
        yield
    except STORE_ERRORS as error:
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()}: {first_line(error)}; {remedy}") from error
    except OSError as error:
        raise WorkflowError(f"{error.filename or Path.cwd()}: {error.strerror or error}; {remedy}") from error


def claim(record: Path) -> FileLock | None:
    """The lock of a run's record, which the system releases when its process ends; None while that lives."""
    lock = FileLock(record.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def release(lock: FileLock, record: Path) -> None:
    """Gives up the lock of a record, which is only left when the run can be gone on with or closed later."""
    lock.release()
    if not record.exists():
        Path(lock.lock_file).unlink(missing_ok=True)


def take_over(own: Path, backup: Callable[[], str]) -> None:
    """Closes the runs that died, leaves alone those that live, and notes in the record `own` the one to go on with."""
    for path in sorted(own.parent.glob("*.lock")):
        record = path.with_suffix("")
        if (lock := claim(record)) is None:
            continue
        close_flow_run(record.name, "Crashed", "its process died")
        run_id = record.read_text() if record.exists() else ""
        known = not run_id or close_run(run_id)
        backups = [path.name for path in (own.parent.parent / run_id).glob(BACKUPS)] if run_id else []
        if known and backups and not own.exists() and "MLFLOW_RUN_ID" not in os.environ and backup() in backups:
            own.write_text(run_id)
            record.unlink()
        elif known and not backups:
            record.unlink(missing_ok=True)
        release(lock, record)


def close_run(run_id: str) -> bool:
    """Whether MLflow has the run; it is KILLED when it was RUNNING, because its process died."""
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if run.info.status == "RUNNING":
        mlflow.MlflowClient().set_terminated(run_id, "KILLED")
    return run.info.lifecycle_stage == "active"


def close_flow_run(flow_run_id: str, name: str, reason: str) -> None:
    """Gives a flow run and its tasks, where they have not ended well, a state; as far as Prefect knows them."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.objects import State
    from prefect.exceptions import ObjectNotFound

    state = State(type=name.upper(), name=name, message=reason)
    with suppress(httpx.HTTPError, ObjectNotFound), get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(flow_run_id)
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
        for set_state, run in [
            (client.set_flow_run_state, flow_run),
            *((client.set_task_run_state, task) for task in tasks),
        ]:
            if run.state is None or not run.state.is_final() or (run.state.is_crashed() and name != "Crashed"):
                set_state(run.id, state, force=True)


@contextmanager
def ending_without_prefect() -> Iterator[None]:
    """A flow whose MLflow run is FINISHED has succeeded, also when Prefect's server could not be told so."""
    import httpx

    try:
        yield
    except httpx.HTTPError as error:
        run = mlflow.last_active_run()
        if run is None or run.info.status != "FINISHED":
            raise WorkflowError("Prefect does not answer: start its server and repeat the command") from error
        print("Prefect does not answer: its history lacks the end of this run")


def cancel(flow, flow_run, state) -> None:
    """A flow's hook: what was stopped by Ctrl-C or a signal is Cancelled, not Crashed."""
    close_flow_run(flow_run.id, "Cancelled", "stopped by Ctrl-C or a signal")


def log_missing(run_id: str, history: list[dict]) -> None:
    """Logs the metrics of the epochs that have not reached MLflow, because it was away."""
    client, uri = mlflow.MlflowClient(), mlflow.get_tracking_uri()
    if uri.startswith("http"):
        requests.get(f"{uri}/version", timeout=10)  # what is on its way to a server that hangs would be waited for
    mlflow.flush_async_logging()
    missing = []
    for name in history[0].keys() - {"time"}:
        there = {metric.step for metric in client.get_metric_history(run_id, name)}
        missing += [Metric(name, row[name], row["time"], step) for step, row in enumerate(history) if step not in there]
    for start in range(0, len(missing), 1000):  # MLflow takes no more at once
        client.log_batch(run_id, missing[start : start + 1000])
