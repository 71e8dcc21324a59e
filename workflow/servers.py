"""What is the same for Prefect and MLflow: whether a server or a database is there, and how to start a server later."""

import re
import shlex
import socket
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from workflow.errors import WorkflowError
from workflow.signals import WINDOWS
from workflow.text import hide_passwords

import requests


def is_up(url: str, pattern: str, remedy: str) -> bool:
    """Whether a server is there: True when it answers with the pattern, False when nothing listens.

    Raises WorkflowError with the remedy when something else listens.
    """
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=2).close()
    except OSError:
        return False
    try:
        response = requests.get(url, timeout=5)
        if response.ok and re.fullmatch(pattern, response.text.strip()):
            return True
    except requests.RequestException:
        pass
    raise WorkflowError(f"port {port} is taken by something else than {remedy}")


def check_address(url: str, variable: str) -> None:
    """Raises WorkflowError when a URL that the user may have set with the variable cannot be that of a server."""
    try:
        address = urlsplit(url)
        is_one = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # of the port
        is_one = False
    if not is_one:
        raise WorkflowError(f"{variable} is no address of a server ({url}): write it like http://127.0.0.1:5000")


def check_own_server(url: str, variable: str) -> None:
    """Raises WorkflowError when no server answers at a URL that the user has set."""
    try:
        answer = requests.get(url, timeout=5)
        if answer.ok or not (urlsplit(url).hostname or "").startswith(("127.", "localhost")):
            return  # a server far away may answer this question only to those it knows
    except requests.RequestException:
        pass
    raise WorkflowError(f"{variable} is set, but no such server answers there ({url}): start it, or unset {variable}")


def check_state_database(file: Path, mode: str = "r+b") -> None:
    """Raises WorkflowError when a database below the folder of the state has no address, or cannot be opened."""
    if forbidden := set("?#%") & set(str(file)):
        raise WorkflowError(
            f"{file.parent} has {' and '.join(sorted(forbidden))} in its name, which the address of a database cannot "
            "have: move the project, or set ML_WORKFLOW_STATE to another folder"
        )
    check_database(file, mode)


def check_database(file: Path, mode: str = "r+b") -> None:
    """Raises WorkflowError when there is an SQLite database at a path that cannot be opened; "rb" only reads it.

    MLflow (3.17) tries for 100 s to open such a database, and Prefect's server (3.8) answers each request with 500.
    """
    try:
        with suppress(FileNotFoundError), open(file, mode):
            pass
    except OSError as error:
        raise WorkflowError(
            f"{file} cannot be {'read' if mode == 'rb' else 'written'}: {error.strerror or error}; let its owner share "
            "it, or set ML_WORKFLOW_STATE to a folder of your own"
        ) from error


def shell_command(*words: str, **variables: object) -> str:
    """A command of Python that a person can copy into the shell at hand, whatever the names; without passwords."""
    variables = {name: hide_passwords(str(value)) for name, value in variables.items()}
    words = tuple(map(hide_passwords, words))
    if WINDOWS:  # PowerShell takes what stands in single quotes as it is
        before = "".join(f"$Env:{name} = {quote_for_powershell(str(value))}; " for name, value in variables.items())
        return f"{before}& {quote_for_powershell(sys.executable)} {' '.join(map(quote_for_powershell, words))}"
    before = "".join(f"{name}={shlex.quote(str(value))} " for name, value in variables.items())
    return f"{before}{shlex.quote(sys.executable)} {shlex.join(words)}"


def near(path: Path) -> str:
    """The path as a person would type it: short where it lies in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def quote_for_powershell(word: str) -> str:
    return word if re.fullmatch(r"[\w-]+", word) else "'" + word.replace("'", "''") + "'"
