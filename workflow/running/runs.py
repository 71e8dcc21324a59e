"""The one MLflow run that a flow run keeps, whatever happens: gone on with when it died, closed when nobody does.

A run that has not ended well has a lock file, which is named after its Prefect flow run, as the run's tag is. The
system frees the lock when the run's process is gone.
"""

import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool  # its threads end with the run
from pathlib import Path
from urllib.parse import urlsplit

from workflow.errors import WorkflowError
from workflow.running.tracking import STORE_ERRORS, first_line, writing

import mlflow
from filelock import FileLock, Timeout
from mlflow.entities import Metric, ViewType
from mlflow.tracking import fluent
from mlflow.utils.file_utils import local_file_uri_to_path

SAMPLING_SECONDS = 0.5  # between two system metrics: a run is over in seconds
UNFINISHED = ".unfinished"  # the folder of the locks of runs that live, died, or can be gone on with
BACKUP = "training.npz"  # in the folder of a run: where its training can go on
END_SECONDS = 10  # for MLflow to take the end of a run that failed: one of its threads may wait for a lock for ever
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # to end a run that failed


@contextmanager
def mlflow_run(
    folder: Path, name: str, tags: dict[str, str], description: str, digest: Callable[[], str]
) -> Iterator[mlflow.ActiveRun]:
    """The one MLflow run of a flow run, with system metrics: FINISHED, FAILED or KILLED as its block ends.

    The run has a folder of its own in `folder`. An earlier run that did not finish, but has the same command_digest
    among its tags, and the data digest() if it came so far, is gone on with. The others that died are closed.
    """
    mlflow.set_system_metrics_sampling_interval(SAMPLING_SECONDS)
    mlflow.set_system_metrics_samples_before_logging(1)
    own, status, keep = folder / UNFINISHED / f"{tags['prefect_flow_run']}.lock", "KILLED", True
    with writing(own):
        own.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(own)
        lock.acquire()
    try:
        with storing("mend it and repeat the command"):
            with FileLock(folder / ".scan.lock"):  # else one who only looks makes a dead run seem to live
                earlier, its_lock = take_over(folder, tags["command_digest"], digest)
                options = {"run_name": name, "tags": tags, "description": description, "log_system_metrics": True}
                run = mlflow.start_run(earlier, **options)
                if its_lock:
                    its_lock.unlink(missing_ok=True)
            yield run
            status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        try:
            keep = end_run(status, folder)
        finally:
            release(lock, keep)


def end_run(status: str, folder: Path) -> bool:
    """Ends the active MLflow run; whether it has to be remembered, because it can be gone on with, or is still open."""
    if (run := mlflow.active_run()) is None:
        return False
    backup = folder / run.info.run_id / BACKUP
    if status == "FINISHED":
        with storing("repeat the command"):
            mlflow.end_run()
        backup.unlink(missing_ok=True)
        return False
    if backup.exists():
        print(f"What was trained is kept in {backup.parent}: the same command goes on from there", flush=True)
    patience = {name: os.environ[name] for name in IMPATIENT}
    os.environ.update(IMPATIENT)
    pool = ThreadPool(1)
    try:
        pool.apply_async(end_failed_run, [run, status]).get(END_SECONDS)
    except (*STORE_ERRORS, multiprocessing.TimeoutError) as error:
        print(f"The next run closes this one in MLflow: {first_line(error) or 'it does not answer'}", flush=True)
        return True
    finally:
        pool.close()
        fluent._active_run_stack.get().clear()  # else MLflow calls it FINISHED at the exit, if it is back by then
        os.environ.update(patience)
    return backup.exists()


def end_failed_run(run: mlflow.ActiveRun, status: str) -> None:
    mlflow.get_run(run.info.run_id)  # raises when MLflow is away; end_run() waits for what is on its way there
    fluent._active_run_stack.get().append(run)  # each thread has a stack of its own
    mlflow.end_run(status)


def release(lock: FileLock, keep: bool) -> None:
    lock.release()
    if not keep:
        Path(lock.lock_file).unlink(missing_ok=True)


@contextmanager
def storing(remedy: str) -> Iterator[None]:
    """Turns what MLflow's store, or a disk, raises in its block into a WorkflowError with the remedy."""
    try:
        yield
    except STORE_ERRORS as error:
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()}: {first_line(error)}; {remedy}") from error
    except OSError as error:
        raise WorkflowError(f"{error.filename or Path.cwd()}: {error.strerror or error}; {remedy}") from error


def take_over(folder: Path, command_digest: str, digest: Callable[[], str]) -> tuple[str | None, Path | None]:
    """The id of the run to go on with, if there is one, and its lock file, to be removed when it has another.

    Closes the other runs that died, leaves alone those that live.
    """
    found, its_lock = None, None
    for path in sorted((folder / UNFINISHED).glob("*.lock")):
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:  # it lives
            continue
        close_flow_run(path.stem, "Crashed", "its process died")
        runs = mlflow.search_runs(
            filter_string=f"tags.prefect_flow_run = '{path.stem}'", run_view_type=ViewType.ALL, output_format="list"
        )
        keep = not runs  # it may be in another store
        for run in runs:
            if run.info.lifecycle_stage == "active":
                backup = folder / run.info.run_id / BACKUP
                if run.info.status == "FINISHED":  # only its process had not ended
                    backup.unlink(missing_ok=True)
                elif found is None and goes_on(run, backup, command_digest, digest):
                    found, its_lock, keep = run.info.run_id, path, True
                else:
                    keep = zipfile.is_zipfile(backup)
                    if run.info.status == "RUNNING":
                        mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
        release(lock, keep)
    return found, its_lock


def goes_on(run, backup: Path, command_digest: str, digest: Callable[[], str]) -> bool:
    """Whether a run that did not finish is of the same command and data, and has not lost what it had trained."""
    same = run.data.tags.get("command_digest") == command_digest and "MLFLOW_RUN_ID" not in os.environ
    if not same or ("loss" in run.data.metrics and not zipfile.is_zipfile(backup)):
        return False
    if "data_digest" not in run.data.params:
        return True
    with suppress(WorkflowError):  # there may be no images any more
        return run.data.params["data_digest"] == digest()
    return False


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
    client = mlflow.MlflowClient()
    client.get_run(run_id)  # raises when the server is gone, or hangs: what is on its way to it would be waited for
    mlflow.flush_async_logging()
    missing = []
    for name in history[0].keys() - {"time"}:
        there = {metric.step for metric in client.get_metric_history(run_id, name)}
        missing += [Metric(name, row[name], row["time"], step) for step, row in enumerate(history) if step not in there]
    for start in range(0, len(missing), 1000):  # MLflow takes no more at once
        client.log_batch(run_id, missing[start : start + 1000])


def log_table(run_id: str, rows: list[dict], columns: tuple[str, ...], file: str) -> None:
    """Logs rows as a table, unless an earlier process of the run has: MLflow would append them to that one."""
    client = mlflow.MlflowClient()
    if file not in [artifact.path for artifact in client.list_artifacts(run_id)]:
        client.log_table(run_id, {name: [row[name] for row in rows] for name in columns}, file)


def logged_model(run) -> str:
    """The id of the model that the MLflow run logged; the last one, where a run was gone on with."""
    client = mlflow.MlflowClient()
    models = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
    return max(models, key=lambda model: model.creation_timestamp).model_id


def share_file(path: Path, logged) -> None:
    """Makes a file, and the copy of it in the model that MLflow has logged, one file with two names.

    That saves a copy per run. It is possible where MLflow keeps artifacts in a folder on the same disk; elsewhere both
    copies stay.
    """
    place = mlflow.get_logged_model(logged.model_id).artifact_location
    if urlsplit(place).scheme not in ("", "file"):
        return
    copy = Path(local_file_uri_to_path(place), "artifacts", path.name)
    with suppress(OSError):
        if copy.read_bytes() == path.read_bytes():
            part = path.with_name(f".{path.name}")
            part.unlink(missing_ok=True)
            part.hardlink_to(copy)
            part.replace(path)
