"""The one MLflow run of a flow run: opened, gone on with when an earlier process of it died, and ended well."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool  # its threads end with the run
from pathlib import Path

from workflow.errors import explain_os_errors, first_line
from workflow.orchestration.recovery import CHECKPOINT, UNFINISHED, Command, recover, release
from workflow.text import hide_passwords
from workflow.tracking.logging import STORE_ERRORS, explain_store_errors

import mlflow
from filelock import FileLock
from mlflow.entities import Run
from mlflow.tracking import fluent
from prefect.runtime import flow_run

SAMPLING_SECONDS = 0.5  # between two system metrics: a run is over in seconds
END_SECONDS = 10  # for MLflow to take the end of a run that failed: one of its threads may wait for a lock for ever
IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # to end a run that failed


@contextmanager
def mlflow_run(folder: Path, command: Command, prefix: str = "") -> Iterator[mlflow.ActiveRun]:
    """The one MLflow run of the current flow run, with system metrics: FINISHED, FAILED or KILLED as its block ends.

    It is named after the flow run, with the prefix before it, and the two link to each other. The run has a folder of
    its own in `folder`. An earlier run of the same command that died is gone on with; the others that died are closed.
    """
    mlflow.set_system_metrics_sampling_interval(SAMPLING_SECONDS)
    mlflow.set_system_metrics_samples_before_logging(1)
    lock_file, status, keep = folder / UNFINISHED / f"{flow_run.id}.lock", "KILLED", True
    with explain_os_errors(lock_file):
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file)
        lock.acquire()
    try:
        with explain_store_errors("mend it and repeat the command"):
            with FileLock(folder / ".scan.lock"):  # a process that only looks at a lock would make its run seem to live
                resumed = recover(folder, command)
                url = hide_passwords(flow_run.ui_url)
                run = mlflow.start_run(
                    resumed[0] if resumed else None,
                    run_name=f"{prefix}{flow_run.name}",
                    tags={"prefect_flow_run": flow_run.id, "prefect_url": url, "command_digest": command.digest},
                    description=f"Prefect flow run: [{flow_run.name}]({url})",
                    log_system_metrics=True,
                )
                if resumed:
                    resumed[1].unlink(missing_ok=True)
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


def active_run() -> Run:
    """The MLflow run that is under way; raises RuntimeError when there is none."""
    if (run := mlflow.active_run()) is None:
        raise RuntimeError("no MLflow run is under way")
    return run


def last_run() -> Run:
    """The last MLflow run of this process; raises RuntimeError when it had none."""
    if (run := mlflow.last_active_run()) is None:
        raise RuntimeError("there was no MLflow run")
    return run


def end_run(status: str, folder: Path) -> bool:
    """Ends the active MLflow run.

    Returns True when its lock file has to stay: the run can be resumed, or MLflow still shows it as running.
    """
    if (run := mlflow.active_run()) is None:
        return False
    checkpoint = folder / run.info.run_id / CHECKPOINT
    if status == "FINISHED":
        with explain_store_errors("repeat the command"):
            mlflow.end_run()
        checkpoint.unlink(missing_ok=True)
        return False
    if checkpoint.exists():
        print(f"What was trained is kept in {checkpoint.parent}: the same command goes on from there", flush=True)
    if not end_failed_run(run, status):
        return True
    return checkpoint.exists()


def end_failed_run(run: mlflow.ActiveRun, status: str) -> bool:
    """Ends a run that failed, in a thread that is waited for END_SECONDS; False when MLflow could not be told.

    The stack of active runs is private in MLflow (3.17). Each thread has its own, so the run is put on that of the
    thread; and it is taken from ours, or MLflow would call the run FINISHED at the exit. A public way to end a run that
    another thread has started would make this unnecessary: set_terminated() leaves its system metrics running.
    """

    def end() -> None:
        mlflow.get_run(run.info.run_id)  # raises when MLflow is away; end_run() would wait for what is on its way
        fluent._active_run_stack.get().append(run)
        mlflow.end_run(status)

    patience = {name: os.environ[name] for name in IMPATIENT}
    os.environ.update(IMPATIENT)
    pool = ThreadPool(1)
    try:
        pool.apply_async(end).get(END_SECONDS)
    except (*STORE_ERRORS, multiprocessing.TimeoutError) as error:
        print(f"The next run closes this one in MLflow: {first_line(error) or 'it does not answer'}", flush=True)
        return False
    finally:
        pool.close()
        fluent._active_run_stack.get().clear()
        os.environ.update(patience)
    return True
