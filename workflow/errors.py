"""The one exception by which the programs stop for a reason that is not a bug."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workflow.text import hide_passwords, printable


class WorkflowError(Exception):
    """What stops a program and is not a bug: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(hide_passwords(printable(message)))  # it may name a file, or repeat what a server has said


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without passwords, what urllib3 adds after it, and SQLAlchemy before it."""
    lines = (line for line in str(error).split("\n") if not line.startswith("(raised as a result of Query-invoked"))
    return hide_passwords(next(lines, "").partition(" with exception HTTPConnectionPool")[0])


def find_workflow_error(error: BaseException | None) -> WorkflowError | None:
    """The WorkflowError that was being handled when an error was raised, if there was one."""
    while error is not None and not isinstance(error, WorkflowError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of its block into a WorkflowError that says that the path cannot be written."""
    try:
        yield
    except OSError as error:
        raise WorkflowError(f"{path} cannot be written: {error.strerror or error}") from error
