"""Command-line helpers: argument parsing, one-line errors with exit status 1 or 2, and shell commands to print."""

import argparse
import errno
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
    """An argument parser that reports usage errors in one line with exit status 2.

    Args:
        documentation: docstring of the program, whose first line is its description; None with `python -OO`
        options: passed to argparse.ArgumentParser
    """

    def __init__(self, documentation: str | None, **options: Any):
        description = (documentation or "").partition("\n")[0]
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_as(kind: Any) -> Callable[[str], Any]:
    """Return an argparse type that validates an option like a flow parameter of type `kind`."""

    def parse(text: str):
        try:
            return TypeAdapter(kind).validate_strings(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error.errors()[0]['msg'].lower()}") from None

    return parse


def exit_within(seconds: float, status: int) -> None:
    """Force the process to exit if background threads keep it alive for longer than `seconds`.

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
        try:
            yield
        finally:
            print(end="", flush=True)  # here rather than at exit, where an error would not be caught
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
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and (error.errno != errno.ENOSPC or error.filename):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of a pipe, such as head, may close it; a full disk is an error.
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"{program}: standard output: {error.strerror}")


def shell_command(*arguments: str, folder: Path | None = None, **variables: object) -> str:
    """Return a command that runs Python, quoted for the user's shell and without passwords.

    Args:
        arguments: passed to the Python interpreter
        folder: where to run it; `python -m` and uvicorn servers import modules from the current folder
        variables: environment variables to set; PATH is a folder to prepend
    """
    quote = quote_for_powershell if WINDOWS else quote_for_posix
    words = [quote(hide_passwords(word)) for word in (sys.executable, *arguments)]
    values = {name: quote(hide_passwords(str(value))) for name, value in variables.items()}
    if WINDOWS:
        if "PATH" in values:
            values["PATH"] += ' + ";$Env:PATH"'
        prefix = [f"cd {quote(str(folder))};"] if folder else []
        return " ".join([*prefix, *(f"$Env:{name} = {value};" for name, value in values.items()), "&", *words])
    if "PATH" in values:
        values["PATH"] += ':"$PATH"'
    prefix = [f"cd {quote(str(folder))} &&"] if folder else []
    return " ".join([*prefix, *(f"{name}={value}" for name, value in values.items()), *words])


def quote_for_powershell(word: str) -> str:
    return word if re.fullmatch(r"[\w-]+", word) else "'" + word.replace("'", "''") + "'"


def quote_for_posix(word: str) -> str:
    """Quote a word; use the form $'...' of bash and zsh for control characters and bytes that are not UTF-8."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word))
    return f"$'{''.join(letters)}'"
