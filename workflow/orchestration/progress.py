"""Show reports and progress in Prefect's UI, or continue without them if its server becomes unreachable."""

import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from workflow.evaluation import report_formats
from workflow.orchestration.logs import stop_sending_logs
from workflow.records import Artifact

import mlflow
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

MIN_UPDATE_SECONDS = 5  # between two updates of a progress bar, because each update is a request
prefect_is_unreachable = threading.Event()  # set when a request fails; no more requests are sent after that


def make_artifact(make: Callable[..., Any], *arguments: object, **options: object) -> UUID | None:
    """Create or update an artifact with one of Prefect's functions; return None if the server is unreachable."""
    if prefect_is_unreachable.is_set():
        return None
    try:
        return make(*arguments, **options)
    except Exception as error:
        prefect_is_unreachable.set()
        stop_sending_logs()
        get_run_logger().warning("Prefect's server is unreachable; the run continues without it: %s", error)
        return None


def publish_report(summary: str, sections: list[report_formats.Section], run_id: str) -> None:
    """Log a report to the MLflow run as HTML, and show it in Prefect's UI as Markdown, described by the summary."""
    html = report_formats.to_html(sections[0][0], sections)
    mlflow.MlflowClient().log_text(run_id, html, Artifact.REPORT)
    text, description = report_formats.to_markdown(sections), report_formats.escape_markdown(summary)
    make_artifact(create_markdown_artifact, text, key="report", description=description)


class Progress:
    """A progress bar in Prefect's UI and, given a `text`, progress lines in the log."""

    def __init__(self, key: str, description: str, text: str = ""):
        self.key, self.description, self.text = key, description, text
        self.next_update: float | None = None  # None until the bar is created
        self.artifact: UUID | None = None

    def __call__(self, done: int, total: int) -> None:
        percent, now = 100 * done / total, time.monotonic()
        if self.next_update is None:
            self.artifact = make_artifact(create_progress_artifact, percent, key=self.key, description=self.description)
        elif now < self.next_update and done < total:
            return
        elif self.artifact:
            make_artifact(update_progress_artifact, self.artifact, percent)
        self.next_update = now + MIN_UPDATE_SECONDS
        if self.text:
            get_run_logger().info("%s: %d of %d", self.text, done, total)


def show_epochs(epochs: int):
    """Return a Keras callback that logs each epoch and updates a progress bar."""
    from keras.callbacks import LambdaCallback

    logger, progress = get_run_logger(), Progress("training", f"Training for {epochs} epochs")
    progress(0, epochs)

    def end_epoch(epoch: int, logs: dict[str, float]) -> None:
        logger.info("epoch %d of %d: %s", epoch + 1, epochs, ", ".join(f"{name} {logs[name]:.4f}" for name in logs))
        progress(epoch + 1, epochs)

    return LambdaCallback(on_epoch_end=end_epoch)
