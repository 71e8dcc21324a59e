"""Check the servers and databases of Prefect and MLflow before they are used."""

import re
import socket
import sqlite3
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from workflow.errors import WorkflowError

import requests

TIMEOUT_SECONDS = 10  # for a server's response; on a busy machine, MLflow's may take several


def is_up(url: str, pattern: str, name: str, alternative: str) -> bool:
    """Return whether the expected server responds at the URL; False if nothing listens on the port.

    Args:
        url: health check of the server
        pattern: regular expression that the response must match
        name: name of the server, for the error message
        alternative: environment variable that selects another server, for the error message

    Raises:
        WorkflowError: another program listens on the port, or the server does not respond in time
    """
    port = listening_port(url)
    try:
        socket.create_connection((urlsplit(url).hostname, port), timeout=2).close()
    except OSError:
        return False
    try:
        response = requests.get(url, timeout=TIMEOUT_SECONDS)
        if response.ok and re.fullmatch(pattern, response.text.strip()):
            return True
    except requests.Timeout:
        problem = f"the program on port {port} did not respond within {TIMEOUT_SECONDS} s"
        remedy = f"if it is {name}'s server, repeat the command once it responds; otherwise, set {alternative}"
        raise WorkflowError(f"{problem}; {remedy}") from None
    except requests.RequestException:
        pass
    raise WorkflowError(f"port {port} is in use by a program other than {name}; stop it, or set {alternative}")


def listening_port(url: str) -> int:
    """Return the port of a URL, or the default port of its scheme."""
    address = urlsplit(url)
    return address.port or (443 if address.scheme == "https" else 80)


def check_address(url: str, variable: str) -> None:
    """Raise WorkflowError if the URL in an environment variable is not a valid server address."""
    try:
        address = urlsplit(url)
        is_valid = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # invalid port
        is_valid = False
    if not is_valid:
        raise WorkflowError(f"{variable} is not a valid server address ({url}); use the form http://127.0.0.1:5000")


def check_custom_server(url: str, origin: str, remedy: str) -> None:
    """Raise WorkflowError if no server responds at a URL that the user has set.

    A remote server may reject this request, because it may require authentication.

    Args:
        url: health check of the server
        origin: where the URL is set, for the error message
        remedy: how to use another server, for the error message
    """
    with suppress(requests.RequestException):
        response = requests.get(url, timeout=TIMEOUT_SECONDS)
        if response.ok or not (urlsplit(url).hostname or "").startswith(("127.", "localhost")):
            return
    raise WorkflowError(f"no server responds at {url} ({origin}); start the server, or {remedy}")


def check_state_database(file: Path, mode: str = "r+b") -> None:
    """Raise WorkflowError if a database in the state folder cannot be opened, or its path is not valid in a URL."""
    if forbidden := {letter for letter in str(file) if letter in "?#%" or "\ud800" <= letter <= "\udfff"}:
        raise WorkflowError(  # a surrogate stands for a byte that is not UTF-8
            f"{file.parent} contains {' and '.join(sorted(forbidden))}, which a database URL cannot contain; move the "
            "project, or set ML_WORKFLOW_STATE to another folder"
        )
    check_database(file, mode)


def check_database(file: Path, mode: str = "r+b") -> None:
    """Raise WorkflowError if an SQLite database exists but cannot be opened; mode "rb" only reads it.

    MLflow (3.17) would keep trying for 100 s, and Prefect's server (3.8) would fail every request.
    """
    try:
        with suppress(FileNotFoundError), open(file, mode):
            pass
    except OSError as error:
        raise WorkflowError(
            f"{file} cannot be {'read' if mode == 'rb' else 'written'} ({error.strerror or error}); change its "
            "permissions, or set ML_WORKFLOW_STATE to a folder of your own"
        ) from error


def check_server_version(url: str, library: str, installed: str, remedy: str) -> None:
    """Raise WorkflowError if the major version of a server differs from that of the installed library.

    Args:
        url: address that returns the version; a server that does not return it passes, because it may need a password
        library: name of the library, for the error message
        installed: version of the installed library
        remedy: how to use another server, for the error message
    """
    with suppress(requests.RequestException):
        match = re.fullmatch(r'"?((\d+)\.[\w.+-]+)"?', requests.get(url, timeout=TIMEOUT_SECONDS).text.strip())
        if match and match[2] != installed.partition(".")[0]:
            raise WorkflowError(
                f"the server at {urlsplit(url).netloc} is {library} {match[1]}, but {library} {installed} is installed "
                f"here; start the server in this environment, or {remedy}"
            )


def needs_migration(file: Path, library: str, installed: str, migrations: Path) -> bool:
    """Return whether an SQLite database was written by an earlier release of a library.

    Args:
        file: the database; False if it is missing, empty or damaged
        library: name of the library, for the error message
        installed: version of the installed library
        migrations: folder with the library's Alembic migrations

    Raises:
        WorkflowError: a later release wrote it
    """
    if not file.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
    except sqlite3.Error:
        return False
    text = "\n".join(path.read_text(encoding="utf-8") for path in migrations.glob("*.py"))
    revisions, replaced = (set(re.findall(rf'^{name} = "(\w+)"', text, re.M)) for name in ("revision", "down_revision"))
    if revision and revision not in revisions:
        raise WorkflowError(
            f"{file} was written by a later version of {library} than the installed {installed}; use the environment "
            "that wrote it, or set ML_WORKFLOW_STATE to another folder"
        )
    return revision in replaced


def back_up(file: Path) -> Path:
    """Copy an SQLite database to a new file beside it, and return the copy's path."""
    copy = file.with_name(f"{file.name}.{datetime.now():%Y%m%d-%H%M%S}.bak")
    try:
        with closing(sqlite3.connect(file)) as database, closing(sqlite3.connect(copy)) as target:
            database.backup(target)
    except sqlite3.Error as error:
        raise WorkflowError(f"{copy}: {error}; {file} must be backed up before it can be migrated") from error
    return copy
