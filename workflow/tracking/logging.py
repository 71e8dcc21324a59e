"""Log to MLflow what autologging does not, and explain errors from MLflow's tracking store."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from workflow.errors import WorkflowError, first_line
from workflow.evaluation import evidence as cross_validation
from workflow.evaluation import metrics, plots
from workflow.records import Artifact, DataIssue, DataVersion, Evaluation, Evidence, ImageFile
from workflow.text import hide_passwords

import mlflow
import requests
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

STORE_ERRORS = (MlflowException, requests.RequestException, SQLAlchemyError)
FILE_COLUMNS = {"file": "file", "class": "class_name", "split": "split", "reason": "reason", "digest": "digest"}
ISSUE_COLUMNS = {"issue": "kind", "file": "file", "class": "class_name", "detail": "detail"}


@contextmanager
def explain_store_errors(remedy: str) -> Iterator[None]:
    """Raise a WorkflowError with the remedy if MLflow's tracking store or the disk fails in the block."""
    try:
        yield
    except STORE_ERRORS as error:
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()}: {first_line(error)}; {remedy}") from error
    except OSError as error:
        raise WorkflowError(f"{error.filename or Path.cwd()}: {error.strerror or error}; {remedy}") from error


def check_logged_epochs(run_id: str, epochs: int) -> None:
    """Raise WorkflowError unless MLflow has the metrics of every epoch.

    Autologging sends them in the background, and MLflow (3.17) does not raise an exception if that fails.
    """
    client = mlflow.MlflowClient()
    client.get_run(run_id)  # if the server is down, this raises, whereas flush_async_logging() would wait
    mlflow.flush_async_logging()
    if (count := len(client.get_metric_history(run_id, "loss"))) != epochs:
        raise WorkflowError(f"MLflow stored the metrics of only {count} of {epochs} epochs; repeat the command")


def log_data(data: DataVersion, name: str) -> None:
    """Log a data version to the active run: its digest, source and files, and an MLflow dataset with this name."""
    mlflow.log_param("data_digest", data.digest)
    mlflow.set_tag("source", data.source)
    # HTTPDatasetSource does not access its URL, so a folder is accepted as well. The base class of MetaDataset declares
    # profile() abstract, but MLflow creates instances, too.
    dataset = MetaDataset(HTTPDatasetSource(data.source), name=name, digest=data.digest[:12])  # type: ignore[abstract]
    try:
        mlflow.log_input(dataset, context="training")
    except MlflowException:  # another run created the same dataset at the same time; now it exists
        mlflow.log_input(dataset, context="training")
    log_table(data.files, FILE_COLUMNS, Artifact.IMAGES)


def log_table(records: Sequence[ImageFile | DataIssue], columns: dict[str, str], file: str) -> None:
    """Log records as a table of the active run; `columns` maps the names of the columns to fields of the records.

    Skip a table that the run already has: mlflow.log_table() would append to it, and other orchestrators preprocess in
    several steps.
    """
    run = mlflow.active_run()
    if run and file in {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run.info.run_id)}:
        return
    mlflow.log_table({name: [getattr(record, field) for record in records] for name, field in columns.items()}, file)


def log_evidence(evidence: Evidence, folder: Path) -> None:
    """Log the results of cross-validation from a run's scratch folder to the active run."""
    mlflow.log_metrics(cross_validation.to_metrics(evidence))
    now = int(1000 * time.time())
    curve = [
        Metric("cv_learning_curve", point.accuracy, now, round(point.images_per_class)) for point in evidence.curve
    ]
    mlflow.MlflowClient().log_batch(folder.name, metrics=curve)
    mlflow.log_artifact(str(folder / Artifact.EVIDENCE))
    mlflow.set_tag("evidence", metrics.describe_cross_validation(evidence))


def log_evaluation(evaluation: Evaluation, folder: Path, model_id: str) -> None:
    """Log the test metrics, the data issues, the evaluation and its plots to the active run.

    Args:
        evaluation: evaluation of the run's model
        folder: scratch folder of the run, with the evaluation
        model_id: id of the logged model that the metrics belong to
    """
    test, class_names = evaluation.test, evaluation.data.class_names
    values = {"test_loss": test.loss, "test_accuracy": test.accuracy}
    values |= {f"test_recall_{metrics.metric_name(name)}": recall for name, recall in test.recall.items()}
    mlflow.log_metrics(values, model_id=model_id)
    log_table(evaluation.issues, ISSUE_COLUMNS, Artifact.ISSUES)
    mlflow.log_artifact(str(folder / Artifact.EVALUATION))
    plots.plot_confusion_matrix(test.predictions, class_names, folder / Artifact.CONFUSION_MATRIX)
    mlflow.log_artifact(str(folder / Artifact.CONFUSION_MATRIX))
    if plots.plot_misclassified_images(test.predictions, evaluation.data, folder / Artifact.MISCLASSIFIED):
        mlflow.log_artifact(str(folder / Artifact.MISCLASSIFIED))


def find_logged_model(run: Run) -> str:
    """Return the id of the model that a run logged; raise WorkflowError if it has been deleted."""
    condition = f"source_run_id = '{run.info.run_id}'"
    models = mlflow.MlflowClient().search_logged_models([run.info.experiment_id], condition)
    if not models:
        raise WorkflowError("the model of this run was deleted in MLflow; repeat the command")
    return models[0].model_id


def read_artifact(run_id: str, name: str) -> bytes | None:
    """Return the content of a run's artifact; None if there is no such run or artifact."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=folder)
            return Path(path).read_bytes()
        except (MlflowException, OSError):
            return None


def describe_run(run_id: str, result: str, text: str) -> None:
    """Prepend the result to the name of a run, and text to its description."""
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    client.update_run(run_id, name=f"{result} · {run.info.run_name}")
    description = run.data.tags.get("mlflow.note.content", "")
    client.set_tag(run_id, "mlflow.note.content", f"{text}\n\n{description}")


def run_page(run: Run, server: str, artifact: str = "") -> str:
    """Return the URL of a run's page in MLflow's UI, or of one of its artifacts there.

    Args:
        run: an MLflow run
        server: address of the UI if the run is stored in a database
        artifact: name of an artifact
    """
    uri = mlflow.get_tracking_uri()
    base = hide_passwords(uri.rstrip("/") if uri.startswith("http") else server)
    page = f"runs/{run.info.run_id}{'/artifacts/' if artifact else ''}{artifact}"
    return f"{base}/#/experiments/{run.info.experiment_id}/{page}?workflowType=machine_learning"
