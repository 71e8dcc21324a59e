"""Command-line helpers: argument parsing, one-line errors with exit status 1 or 2, and shell commands to print."""

import argparse
import io
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from workflow.errors import WorkflowError, first_line
from workflow.settings import find_unusable_proxy
from workflow.signals import WINDOWS, resend_dropped_signal
from workflow.text import hide_passwords

from mlflow.exceptions import MlflowException
from pydantic import TypeAdapter, ValidationError

EXIT_SECONDS = 30  # at the end of the program, for background threads to finish sending data to servers
STOP_SECONDS = 3  # the same after Ctrl-C


class Parser(argparse.ArgumentParser):
    """An argument parser that reports usage errors in one line with exit status 2."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_as(kind: Any) -> Callable[[str], Any]:
    """Return an argparse type that validates an option like a flow parameter of the type `kind`."""

    def parse(text: str):
        try:
            return TypeAdapter(kind).validate_strings(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error.errors()[0]['msg'].lower()}") from None

    return parse


def exit_within(seconds: float, status: int) -> None:
    """Force the process to exit if background threads keep it alive for longer than this.

    Prefect (3.8) sends task states in a thread that Python waits for, and retries each request for two minutes.
    """

    def force_exit() -> None:
        with suppress(OSError):
            print(end="", flush=True)
        os._exit(status)

    deadline = threading.Timer(seconds, force_exit)
    deadline.daemon = True
    deadline.start()


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """Run the body of a program; print an expected error as one line and exit with status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every file name can be encoded
    sys.unraisablehook = resend_dropped_signal
    try:
        if name := find_unusable_proxy():
            raise WorkflowError(f"{name} is not a usable HTTP proxy; use the form http://HOST:3128, or unset it")
        yield
        exit_within(EXIT_SECONDS, 0)
    except SystemExit as end:
        exit_within(EXIT_SECONDS, end.code if isinstance(end.code, int) else 1)
        raise
    except (WorkflowError, MlflowException) as error:
        exit_within(EXIT_SECONDS, 1)
        sys.exit(f"{program}: {first_line(error)}")
    except KeyboardInterrupt:
        exit_within(STOP_SECONDS, 1)
        sys.exit(f"{program}: stopped")
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def shell_command(*arguments: str, **variables: object) -> str:
    """Return a command that runs Python, quoted for the user's shell and without passwords.

    Args:
        arguments: for the Python interpreter
        variables: environment variables to set
    """
    variables = {name: hide_passwords(str(value)) for name, value in variables.items()}
    arguments = tuple(map(hide_passwords, arguments))
    if WINDOWS:
        prefix = "".join(f"$Env:{name} = {quote_for_powershell(str(value))}; " for name, value in variables.items())
        return f"{prefix}& {quote_for_powershell(sys.executable)} {' '.join(map(quote_for_powershell, arguments))}"
    prefix = "".join(f"{name}={shlex.quote(str(value))} " for name, value in variables.items())
    return f"{prefix}{shlex.quote(sys.executable)} {shlex.join(arguments)}"


def quote_for_powershell(word: str) -> str:
    return word if re.fullmatch(r"[\w-]+", word) else "'" + word.replace("'", "''") + "'"


def relative_to_cwd(path: Path) -> str:
    """Return the path relative to the current directory if it is inside that directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
