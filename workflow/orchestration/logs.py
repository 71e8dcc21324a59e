"""What Prefect and MLflow log: errors that are no bugs in one line, and nothing that the program says itself."""

import logging

from workflow.errors import WorkflowError, first_line
from workflow.text import hide_passwords, printable
from workflow.tracking.logging import STORE_ERRORS

RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
SILENT_LOGGERS = (
    "urllib3.connectionpool",  # what this one and the next two could not send they try again, or log_missing() sends it
    "mlflow.utils.async_logging",
    "mlflow.system_metrics",
    "mlflow.store.db.utils",  # what it logs it raises, too
)


def shorten_logged_errors() -> None:
    """Makes Prefect log what is no bug as one line, without a traceback; may be called again.

    Prefect 3.8 has no setting for this.
    """
    for name in RUN_LOGGERS:
        logging.getLogger(name).addFilter(shorten)
    for name in SILENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def shorten(record: logging.LogRecord) -> bool:
    """A filter of a logger: of an error that is no bug only the first line, without passwords, and as plain text."""
    import httpx

    error = record.exc_info and record.exc_info[1]
    if isinstance(error, (WorkflowError, OSError, httpx.HTTPError, *STORE_ERRORS)):
        record.msg, record.args, record.exc_info = first_line(error), (), None
    record.msg, record.args = hide_passwords("\n".join(map(printable, record.getMessage().split("\n")))), ()
    return True


def stop_sending_logs() -> None:
    """Makes Prefect's loggers send nothing more to its server; the terminal has another handler.

    The handlers are Prefect's own (3.8): with PREFECT_LOGGING_TO_API_ENABLED they are chosen before a run alone.
    """
    for name in RUN_LOGGERS:
        logging.getLogger(name).handlers.clear()
