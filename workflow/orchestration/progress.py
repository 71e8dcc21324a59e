"""What a run shows in Prefect's UI: artifacts and progress bars. When Prefect's server is gone, the run goes on."""

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

from workflow.orchestration.logs import stop_sending_logs

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

prefect_is_gone = threading.Event()  # Prefect's server did not answer: it is asked no more


def make_artifact(make: Callable[..., Any], *arguments: object, **options: object) -> UUID | None:
    """Makes or updates an artifact with a function of Prefect's; a server that does not answer fails nothing."""
    if prefect_is_gone.is_set():
        return None
    try:
        return make(*arguments, **options)
    except Exception as error:
        prefect_is_gone.set()
        stop_sending_logs()
        get_run_logger().warning("an artifact could not be made in Prefect, the run goes on without its UI: %s", error)
        return None


class Progress:
    """Shows how far a step has come: a progress bar in the Prefect UI, and with a text a line in the log."""

    def __init__(self, key: str, description: str, text: str = ""):
        self.key, self.description, self.text, self.shown, self.started = key, description, text, 0.0, False
        self.artifact: UUID | None = None

    def __call__(self, done: int, total: int) -> None:
        """Updates the bar at most every tenth of the whole, because each update costs a request."""
        percent = 100 * done / total
        if not self.started:
            self.artifact = make_artifact(create_progress_artifact, percent, key=self.key, description=self.description)
            self.started = True
        elif percent < self.shown + 10 and done < total:
            return
        elif self.artifact:
            make_artifact(update_progress_artifact, self.artifact, percent)
        self.shown = percent
        if self.text:
            get_run_logger().info("%s: %d of %d", self.text, done, total)


def show_epochs(done: int, epochs: int):
    """A Keras callback: for each epoch a line in the log and a step of the progress bar in the Prefect UI."""
    from keras.callbacks import LambdaCallback

    logger = get_run_logger()
    if done:
        logger.info("going on after epoch %d of %d", done, epochs)
    progress = Progress("training", f"Training: how many of its {epochs} epochs are over")
    progress(done, epochs)

    def end_epoch(epoch: int, logs: dict[str, float]) -> None:
        logger.info("epoch %d of %d: %s", epoch + 1, epochs, ", ".join(f"{name} {logs[name]:.4f}" for name in logs))
        progress(epoch + 1, epochs)

    return LambdaCallback(on_epoch_end=end_epoch)
