"""What a run leaves in MLflow's store beyond what is logged automatically, and what the store says when it fails."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from workflow.errors import WorkflowError, first_line

import mlflow
import requests
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.exc import SQLAlchemyError

STORE_ERRORS = (MlflowException, requests.RequestException, SQLAlchemyError)
METRICS_AT_ONCE = 1000  # MLflow takes no more


@contextmanager
def explain_store_errors(remedy: str) -> Iterator[None]:
    """Turns what MLflow's store, or a disk, raises in its block into a WorkflowError with the remedy."""
    try:
        yield
    except STORE_ERRORS as error:
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()}: {first_line(error)}; {remedy}") from error
    except OSError as error:
        raise WorkflowError(f"{error.filename or Path.cwd()}: {error.strerror or error}; {remedy}") from error


def log_missing(run_id: str, history: list[dict[str, float]]) -> None:
    """Logs the metrics of the epochs that have not reached MLflow, because it was away."""
    client = mlflow.MlflowClient()
    client.get_run(run_id)  # raises when the server is gone or hangs: else flush_async_logging() would wait for it
    mlflow.flush_async_logging()
    missing = []
    for name in history[0].keys() - {"time"}:
        there = {metric.step for metric in client.get_metric_history(run_id, name)}
        rows = [(step, row) for step, row in enumerate(history) if step not in there]
        missing += [Metric(name, row[name], int(row["time"]), step) for step, row in rows]
    for start in range(0, len(missing), METRICS_AT_ONCE):
        client.log_batch(run_id, missing[start : start + METRICS_AT_ONCE])


def log_table(run_id: str, columns: dict[str, list[str | None]], file: str) -> None:
    """Logs a table, unless an earlier process of the run has: MLflow would append the rows to that one."""
    client = mlflow.MlflowClient()
    if file not in [artifact.path for artifact in client.list_artifacts(run_id)]:
        client.log_table(run_id, columns, file)


def find_logged_model(run: Run) -> str:
    """The id of the model that the MLflow run logged; the last one, where a run was gone on with."""
    client = mlflow.MlflowClient()
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client.get_logged_model(output.model_id) for output in outputs]
    return max(models, key=lambda model: model.creation_timestamp).model_id


def share_file(path: Path, model_id: str) -> None:
    """Makes a file, and the copy of it in the model that MLflow has logged, one file with two names.

    That saves a copy per run. It is possible where MLflow keeps artifacts in a folder on the same disk; elsewhere both
    copies stay.
    """
    place = mlflow.get_logged_model(model_id).artifact_location
    if urlsplit(place).scheme not in ("", "file"):
        return
    copy = Path(local_file_uri_to_path(place), "artifacts", path.name)
    with suppress(OSError):
        if copy.read_bytes() == path.read_bytes():
            part = path.with_name(f".{path.name}")
            part.unlink(missing_ok=True)
            part.hardlink_to(copy)
            part.replace(path)


def run_page(run: Run, server: str) -> str:
    """The URL of the run's page in MLflow's UI; `server` stands in where the run went to a database."""
    uri = mlflow.get_tracking_uri()
    base = uri.rstrip("/") if uri.startswith("http") else server
    return f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
