"""What a run leaves in MLflow's store beyond what is logged automatically, and what the store says when it fails."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from workflow.errors import WorkflowError, first_line
from workflow.records import DataIssue, DataVersion, ImageFile
from workflow.text import hide_passwords

import mlflow
import requests
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.exc import SQLAlchemyError

STORE_ERRORS = (MlflowException, requests.RequestException, SQLAlchemyError)
METRICS_AT_ONCE = 1000  # MLflow takes no more
FILE_COLUMNS = {"file": "file", "class": "class_name", "split": "split", "reason": "reason", "digest": "digest"}
ISSUE_COLUMNS = {"issue": "kind", "file": "file", "class": "class_name", "detail": "detail"}


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


def log_data(data: DataVersion, name: str) -> None:
    """Logs the data version, its source and the fate of every file to the active MLflow run.

    MLflow shows it as a data set with that name.
    """
    mlflow.log_param("data_digest", data.digest)
    mlflow.set_tag("source", data.source)
    # HTTPDatasetSource only shows the source, so a folder can stand where a URL is meant. MLflow makes such data sets
    # itself, although its base class calls profile() abstract.
    dataset = MetaDataset(HTTPDatasetSource(data.source), name=name, digest=data.digest[:12])  # type: ignore[abstract]
    try:
        mlflow.log_input(dataset, context="training")
    except MlflowException:  # another run made the same entry at the same moment; now it is there
        mlflow.log_input(dataset, context="training")
    if run := mlflow.active_run():
        log_table(run.info.run_id, data.files, FILE_COLUMNS, "images.json")


def log_table(run_id: str, records: Sequence[ImageFile | DataIssue], columns: dict[str, str], file: str) -> None:
    """Logs records as a table: each column has a title, and the name of the record's field.

    An earlier process of the run may have logged it: then nothing is done, because MLflow would append the rows.
    """
    client = mlflow.MlflowClient()
    if file not in [artifact.path for artifact in client.list_artifacts(run_id)]:
        table = {title: [getattr(record, name) for record in records] for title, name in columns.items()}
        client.log_table(run_id, table, file)


def find_logged_model(run: Run) -> str:
    """The id of the model that the MLflow run logged; the last one, where a run was gone on with.

    Models that the user has deleted do not count. Raises WorkflowError when there is no other.
    """
    of_run = f"source_run_id = '{run.info.run_id}'"
    models = mlflow.MlflowClient().search_logged_models([run.info.experiment_id], of_run)
    if not models:
        raise WorkflowError("the model that this run has logged was deleted in MLflow: repeat the command")
    return max(models, key=lambda model: model.creation_timestamp).model_id


def name_run(run_id: str, result: str, text: str) -> None:
    """Puts the result of a run before its name, which MLflow's list shows first, and a text on its page."""
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    own = (run.info.run_name or "").rpartition(" · ")[2]  # the task may be done again
    link = run.data.tags.get("mlflow.note.content", "").rpartition("\n\n")[2]  # to the flow run
    client.update_run(run_id, name=f"{result} · {own}")
    client.set_tag(run_id, "mlflow.note.content", f"{text}\n\n{link}")


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
    base = hide_passwords(uri.rstrip("/") if uri.startswith("http") else server)
    return f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
