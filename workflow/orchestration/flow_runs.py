"""Track flow runs in Prefect and MLflow, even if they are killed or stopped, or if Prefect's server is unavailable."""

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from workflow.errors import WorkflowError, explain_os_errors, find_workflow_error
from workflow.files import locked
from workflow.orchestration.progress import make_artifact
from workflow.settings import PROJECT
from workflow.tracking.logging import explain_store_errors, run_page
from workflow.tracking.run import mlflow_run

import httpx
import mlflow
from filelock import FileLock, Timeout
from mlflow.entities import ViewType
from prefect import Flow
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.runtime import flow_run

LOCKS = ".running"  # folder with a lock file per flow run; the operating system releases the locks of dead processes


@contextmanager
def tracked_run(folder: Path, server: str, prefix: str = "") -> Iterator[None]:
    """Track the current flow run in one MLflow run, and link to it from Prefect's UI.

    Args:
        folder: contains the scratch folders and locks of all runs
        server: address of MLflow's UI, used in links if the tracking store is a database
        prefix: prefix of the MLflow run's name
    """
    with lock_run(folder), mlflow_run(folder, prefix) as run:
        description = "Parameters, metrics, report and model in MLflow"
        make_artifact(create_link_artifact, run_page(run, server), key="mlflow-run", description=description)
        yield


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Clean up after earlier runs whose processes died, and hold a lock while this run is in progress.

    After a failure the lock file remains, so that the next run checks whether this one was recorded as ended.
    """
    lock, scan = FileLock(folder / LOCKS / f"{flow_run.id}.lock"), folder / ".scan.lock"
    with explain_os_errors(folder), explain_store_errors("fix this and repeat the command"):
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        with locked(scan):  # otherwise another run could lock the new file first, and take this run for a dead one
            close_dead_runs(folder)
            lock.acquire()
    try:
        yield
    except BaseException:
        lock.release()
        raise
    with locked(scan):
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def close_dead_runs(folder: Path) -> None:
    """Mark runs whose processes died as KILLED in MLflow and Crashed in Prefect, and remove their scratch folders."""
    for path in sorted((folder / LOCKS).glob("*.lock")):
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:  # its process is alive
            continue
        close_flow_run(path.stem, "Crashed", "its process died")
        condition = f"tags.prefect_flow_run = '{path.stem}'"
        runs = mlflow.search_runs(filter_string=condition, run_view_type=ViewType.ALL, output_format="list")
        for run in runs:
            if run.info.status == "RUNNING" and run.info.lifecycle_stage == "active":
                mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
            shutil.rmtree(folder / run.info.run_id, ignore_errors=True)
        lock.release()
        if runs:  # otherwise the run may be in another tracking store
            path.unlink(missing_ok=True)


def explain_prefect_error(error: httpx.HTTPError) -> WorkflowError:
    """Return a WorkflowError that says what to do about an error from Prefect's server."""
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
        remedy = "set PREFECT_API_AUTH_STRING and repeat the command"
        return WorkflowError(f"Prefect's server requires authentication; {remedy}")
    return WorkflowError("Prefect's server does not respond; start it and repeat the command")


def close_flow_run(flow_run_id: str | UUID, name: str, reason: str) -> None:
    """Set the final state of a flow run and its tasks, unless they already have one other than Crashed.

    Do nothing if the server does not respond or does not have the run.
    """
    state: State[Any] = State(type=StateType(name.upper()), name=name, message=reason)
    with suppress(httpx.HTTPError, ObjectNotFound), get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run_id)  # type: ignore[arg-type]  # a string is accepted as well
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
        runs: list[tuple[Callable[..., object], FlowRun | TaskRun]] = [
            (client.set_flow_run_state, run),
            *((client.set_task_run_state, task) for task in tasks),
        ]
        for set_state, item in runs:
            if item.state is None or not item.state.is_final() or (item.state.is_crashed() and name != "Crashed"):
                set_state(item.id, state, force=True)


def mark_cancelled(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Mark a flow run that was stopped by Ctrl-C or a signal as Cancelled, not Crashed; a hook for `on_crashed`."""
    close_flow_run(flow_run.id, "Cancelled", "stopped by Ctrl-C or a signal")


@contextmanager
def tolerate_prefect_outage() -> Iterator[None]:
    """Ignore errors from Prefect's server if the block's MLflow run has finished.

    Raises:
        WorkflowError: the run has not finished; if it failed with a WorkflowError, that error
    """
    before = mlflow.last_active_run()
    try:
        yield
    except httpx.HTTPError as error:
        run = mlflow.last_active_run()
        is_new = run is not None and (before is None or run.info.run_id != before.info.run_id)
        if run is None or not is_new or run.info.status != "FINISHED":
            raise find_workflow_error(error) or explain_prefect_error(error) from None
        print("Prefect's server did not respond, so it did not record how this run ended")


def serve_flow(flow: Flow[..., Any], name: str, **options: Any) -> None:
    """Serve a flow like flow.serve() until Ctrl-C or SIGTERM, then cancel its run and raise KeyboardInterrupt.

    Runner.handle_sigterm() is replaced, because Prefect's (3.8) never awaits astop(). Once it does, use flow.serve().
    """
    logging.getLogger("prefect.runner").setLevel(logging.WARNING)
    runner = Runner(name, limit=1)

    def stop(*_: object) -> None:
        runner.execute_in_background(runner.astop)

    runner.handle_sigterm = stop  # type: ignore[method-assign]
    try:
        os.environ["PYTHONSAFEPATH"] = "1"  # its runs are child processes: `python -m prefect.engine`
        with chdir(PROJECT):  # Prefect reads settings in this folder
            runner.add_flow(flow, name, **options)
            asyncio.run(runner.start())
    except httpx.HTTPError as error:
        raise explain_prefect_error(error) from error
    raise KeyboardInterrupt
