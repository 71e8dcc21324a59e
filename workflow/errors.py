"""WorkflowError, the exception for every failure that is not a bug, and functions that shorten error messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workflow.text import hide_passwords, printable


class WorkflowError(Exception):
    """A failure that is not a bug. Its message is one line: the problem and what to do about it."""

    def __init__(self, message: str):
        super().__init__(hide_passwords(printable(message)))  # it may contain a file name or a server's response


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without passwords or the text that urllib3 and SQLAlchemy add."""
    lines = (line for line in str(error).split("\n") if not line.startswith("(raised as a result of Query-invoked"))
    return hide_passwords(next(lines, "").partition(" with exception HTTPConnectionPool")[0])


def find_workflow_error(error: BaseException | None) -> WorkflowError | None:
    """Return the WorkflowError in an error's chain of causes and contexts, or None."""
    while error is not None and not isinstance(error, WorkflowError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Raise a WorkflowError that names the path if the block raises OSError."""
    try:
        yield
    except OSError as error:
        raise WorkflowError(f"{path} cannot be written: {error.strerror or error}") from error
