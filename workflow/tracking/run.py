"""Start and end the MLflow run that belongs to a flow run."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workflow.errors import first_line
from workflow.signals import interrupt_after
from workflow.text import hide_passwords
from workflow.tracking.connection import find_given_run
from workflow.tracking.logging import STORE_ERRORS, explain_store_errors

import mlflow
from mlflow.entities import Run
from prefect.runtime import flow_run

SHORT_TIMEOUT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # for ending a failed run
MAX_END_SECONDS = 5  # for ending a failed run, which sends its queued metrics first


@contextmanager
def mlflow_run(folder: Path, prefix: str = "") -> Iterator[mlflow.ActiveRun]:
    """Start an MLflow run for the current flow run, and end it as FINISHED, FAILED or KILLED.

    The runs in MLflow and Prefect have the same name and link to each other.

    Args:
        folder: contains the scratch folders; the one named after the MLflow run is removed at the end
        prefix: prefix of the MLflow run's name
    """
    url = hide_passwords(flow_run.ui_url or "")
    with explain_store_errors("fix this and repeat the command"):
        find_given_run()  # again, because a served flow has several runs
        run = mlflow.start_run(
            run_name=f"{prefix}{flow_run.name}",
            tags={"prefect_flow_run": flow_run.id, "prefect_url": url},
            description=f"Prefect flow run: [{flow_run.name}]({url})",
        )
    status = "KILLED"
    try:
        with explain_store_errors("fix this and repeat the command"):
            yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        end_run(status)
        shutil.rmtree(folder / run.info.run_id, ignore_errors=True)


def end_run(status: str) -> None:
    """End the active MLflow run. If MLflow is unreachable, the next run marks a failed run as KILLED instead."""
    if status == "FINISHED":
        with explain_store_errors("repeat the command"):
            mlflow.end_run()
        return
    os.environ.update(SHORT_TIMEOUT)
    try:
        with interrupt_after(MAX_END_SECONDS):
            mlflow.end_run(status)
    except (KeyboardInterrupt, *STORE_ERRORS) as error:
        reason = first_line(error) or "its server does not respond"
        print(f"MLflow could not record the end of this run ({reason}); the next run will do so", flush=True)


def active_run() -> Run:
    """Return the active MLflow run; raise RuntimeError if there is none."""
    if (run := mlflow.active_run()) is None:
        raise RuntimeError("there is no active MLflow run")
    return run


def last_run() -> Run:
    """Return the last MLflow run of this process; raise RuntimeError if there is none."""
    if (run := mlflow.last_active_run()) is None:
        raise RuntimeError("this process had no MLflow run")
    return run


def find_newest_run(experiment: str) -> Run | None:
    """Return the newest run of an experiment that has registered a model; None if there is none."""
    if (entry := mlflow.get_experiment_by_name(experiment)) is None:
        return None
    condition = "attributes.status = 'FINISHED' AND tags.gate LIKE '%'"  # the gate decides on each registered version
    order = ["attributes.start_time DESC"]
    runs = mlflow.MlflowClient().search_runs([entry.experiment_id], condition, max_results=1, order_by=order)
    return next(iter(runs), None)
