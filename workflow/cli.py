"""The beginning and the end of a program: its options, and how it ends in one line whatever stops it."""

import argparse
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from workflow.errors import WorkflowError, first_line
from workflow.settings import find_unusable_proxy
from workflow.signals import send_dropped_again

from mlflow.exceptions import MlflowException
from pydantic import TypeAdapter, ValidationError

EXIT_SECONDS = 30  # for threads to send what a server has not got yet, after the last line of a program
STOP_SECONDS = 3  # the same, when the program was stopped


class Parser(argparse.ArgumentParser):
    """A command line whose misuse ends in one line and exit status 2."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help shows the usage\n")


def parse_as(kind: Any) -> Callable[[str], Any]:
    """For argparse: the value of an option, held to a type of the flow's parameters."""

    def parse(text: str):
        try:
            return TypeAdapter(kind).validate_strings(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error.errors()[0]['msg'].lower()}") from None

    return parse


def end_within(seconds: float, status: int) -> None:
    """Ends the process by force when one of its threads holds it for so long; its output is whole.

    Prefect (3.8) sends the states of tasks in a thread, for which Python waits at the exit. When the server hangs,
    Prefect tries for two minutes with each of them.
    """

    def leave() -> None:
        with suppress(OSError):
            print(end="", flush=True)
        os._exit(status)

    deadline = threading.Timer(seconds, leave)
    deadline.daemon = True
    deadline.start()


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """The whole of a program: what stops it ends in one line and exit status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every file name can be printed
    sys.unraisablehook = send_dropped_again
    try:
        if name := find_unusable_proxy():
            raise WorkflowError(
                f"{name} names a proxy that cannot be used here: name an HTTP proxy, like http://HOST:3128, or unset it"
            )
        yield
        end_within(EXIT_SECONDS, 0)
    except (WorkflowError, MlflowException) as error:
        end_within(EXIT_SECONDS, 1)
        sys.exit(f"{program}: {first_line(error)}")
    except KeyboardInterrupt:
        end_within(STOP_SECONDS, 1)
        sys.exit(f"{program}: stopped")
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
