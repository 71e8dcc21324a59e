"""Shorten logs: log expected errors in one line, and silence messages about what the program itself reports."""

import logging

from workflow.errors import WorkflowError, first_line
from workflow.text import hide_passwords, printable
from workflow.tracking.logging import STORE_ERRORS

RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
SILENT_LOGGERS = (
    "urllib3.connectionpool",  # requests are retried
    "mlflow.utils.async_logging",  # check_logged_epochs() reports lost metrics
    "mlflow.system_metrics",
    "mlflow.store.db.utils",  # the errors that it logs are also raised
)


def shorten_logged_errors() -> None:
    """Make Prefect log expected errors in one line, without a traceback. Prefect (3.8) has no setting for this."""
    for name in RUN_LOGGERS:
        logging.getLogger(name).addFilter(shorten)
    for name in SILENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def shorten(record: logging.LogRecord) -> bool:
    """Shorten an expected error to its first line, and escape unprintable characters; a filter for loggers."""
    import httpx

    error = record.exc_info and record.exc_info[1]
    if isinstance(error, (WorkflowError, OSError, httpx.HTTPError, *STORE_ERRORS)):
        record.msg, record.args, record.exc_info = first_line(error), (), None
    record.msg, record.args = hide_passwords("\n".join(map(printable, record.getMessage().split("\n")))), ()
    return True


def stop_sending_logs() -> None:
    """Stop sending logs to Prefect's server. The terminal still shows them, through another logger's handler.

    Prefect (3.8) reads PREFECT_LOGGING_TO_API_ENABLED only before a run, so its handlers are removed.
    """
    for name in RUN_LOGGERS:
        logging.getLogger(name).handlers.clear()
