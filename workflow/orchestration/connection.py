"""Connect to Prefect: to PREFECT_API_URL, a server on this machine, or one that the run starts."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from workflow.cli import shell_command
from workflow.errors import WorkflowError, explain_os_errors
from workflow.files import locked
from workflow.model.keras_import import import_keras
from workflow.orchestration import prefect_settings
from workflow.orchestration.logs import RUN_LOGGERS, shorten_logged_errors
from workflow.servers import (
    back_up,
    check_address,
    check_custom_server,
    check_database,
    check_server_version,
    check_state_database,
    is_up,
    listening_port,
    needs_migration,
)
from workflow.settings import Settings, settings
from workflow.text import hide_passwords, printable
from workflow.tracking.connection import connect_mlflow, describe_mlflow_command, uri_origin

import mlflow
import prefect
import requests
from prefect.settings import get_current_settings

SERVER_PROGRAM = Path(__file__).with_name("server.py")
START_SECONDS = 90  # for a Prefect server; creating its database takes most of the time
STOP_SECONDS = 10
MIGRATIONS = Path(prefect.__file__).parent / "server/database/_migrations/versions/sqlite"


@contextmanager
def connect_servers(mlflow_url: str, experiment: str, prefect_home: Path, preload_keras: bool = True) -> Iterator[str]:
    """Connect to MLflow and Prefect, and start a Prefect server if none is running.

    At the end, print the commands that start servers for viewing runs that were made without them.

    Args:
        mlflow_url: address of an MLflow server on this machine
        experiment: the MLflow experiment
        prefect_home: folder for the history of runs made without a Prefect server
        preload_keras: whether to import Keras in a thread, for a process that will train

    Yields:
        The URL of Prefect's UI.
    """
    connect_mlflow(mlflow_url, settings.state, experiment)
    has_prefect = connect_prefect()
    print(describe_servers(has_prefect), flush=True)
    if preload_keras:
        threading.Thread(target=import_keras).start()  # saves 3.5 s of 23 s while Prefect's server starts
    if has_prefect:
        yield hide_passwords(get_current_settings().ui_url or "")
        history = ""
    else:
        with temporary_prefect_server(prefect_home) as url:
            yield url
        history = f"To see the flow runs, start Prefect: {prefect_command(prefect_home)}"
    print(*filter(None, [history, describe_mlflow_command()]), sep="\n")


def describe_servers(has_prefect: bool) -> str:
    """Return a sentence with the servers that a run uses and, if others can use them, how to use separate ones."""
    prefect, uri = get_current_settings().ui_url if has_prefect else None, mlflow.get_tracking_uri()
    origin = f" ({prefect_settings.describe_api_url()[0]})" if has_prefect and prefect != settings.prefect_url else ""
    servers = f"Prefect: {prefect or 'a server for this run only'}{origin}. MLflow: {printable(uri)}{uri_origin()}."
    servers, defaults = hide_passwords(servers), Settings.model_fields
    if prefect != defaults["prefect_url"].default and uri != defaults["mlflow_url"].default:
        return servers
    return (
        f"{servers} Other users of this machine can use these servers, too. To use your own, choose other ports: "
        "ML_WORKFLOW_PREFECT_URL=http://127.0.0.1:4201 ML_WORKFLOW_MLFLOW_URL=http://127.0.0.1:5003"
    )


def prefect_command(home: Path) -> str:
    """Return the command that starts a Prefect server at settings.prefect_url with the history in a folder."""
    variables = {"PREFECT_HOME": str(home)}
    if settings.prefect_url != Settings.model_fields["prefect_url"].default:
        variables["PREFECT_SERVER_API_PORT"] = str(listening_port(settings.prefect_url))
    return shell_command("-m", "prefect", "server", "start", "--no-prompt", folder=home, **variables)


def connect_prefect() -> bool:
    """Use the server at PREFECT_API_URL if set, else a server on this machine; return False if none is running."""
    shorten_logged_errors()
    if custom := get_current_settings().api.url:
        origin, remedy = prefect_settings.describe_api_url()
        check_address(custom, f"Prefect's API URL, {origin},")
        check_custom_server(f"{custom}/health", origin, remedy)
        check_prefect_version(custom, remedy)
        return True
    check_address(settings.prefect_url, "ML_WORKFLOW_PREFECT_URL")
    if is_up(f"{settings.prefect_url}/api/health", "true", "Prefect", "PREFECT_API_URL to your server"):
        remedy = "set ML_WORKFLOW_PREFECT_URL to an unused port, such as http://127.0.0.1:4201"
        check_prefect_version(f"{settings.prefect_url}/api", remedy)
        use_prefect(settings.prefect_url)
        return True
    return False


def check_prefect_version(api: str, remedy: str) -> None:
    """Raise WorkflowError if the major version of Prefect's server differs from that of the installed Prefect."""
    check_server_version(f"{api}/admin/version", "Prefect", prefect.__version__, remedy)


def use_prefect(url: str) -> None:
    """Make Prefect use the server at a URL. Links point to settings.prefect_url, where a later server shows runs."""
    os.environ.update(PREFECT_API_URL=f"{url}/api", PREFECT_UI_URL=settings.prefect_url)
    prefect_settings.refresh()


@contextmanager
def temporary_prefect_server(home: Path) -> Iterator[str]:
    """Start a Prefect server that stops at the end of the block, or when this process ends.

    Args:
        home: folder for its database and log

    Yields:
        The URL of its UI.

    Raises:
        WorkflowError: it does not start, or its database cannot be used
    """
    check_state_database(home / "prefect.db")
    with explain_os_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        (home / "server.log").touch()
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with locked(home / ".lock"):  # the first server creates the database
        check_database(home / "prefect.db")  # again: another user's run may have created it in the meantime
        prepare_migration(home / "prefect.db")
        server = start_server(home, port)
        wait_for_server(server, url, home / "server.log")
    try:
        use_prefect(url)
        print(f"Prefect's UI during this run: {url}", flush=True)
        yield url
    finally:
        for name in RUN_LOGGERS:
            for handler in logging.getLogger(name).handlers:
                handler.flush()  # Prefect sends logs in batches
        stop_server(server)


def prepare_migration(file: Path) -> None:
    """Back up a database from an earlier release, because the server migrates it; reject one from a later release."""
    if needs_migration(file, "Prefect", prefect.__version__, MIGRATIONS):
        backup = back_up(file)
        print(f"{file}: migrating from an older Prefect release to {prefect.__version__}; backup: {backup}", flush=True)


def start_server(home: Path, port: int) -> subprocess.Popen[bytes]:
    """Start server.py."""
    environment = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",  # Prefect's default allows every website
    }
    with open(home / "server.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", str(SERVER_PROGRAM), str(port)],
            env=environment,
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only the run, which then stops the server
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )


def wait_for_server(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server responds; raise WorkflowError if it exits or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"{url}/api/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.05)
    stop_server(server)
    raise WorkflowError(f"Prefect's server did not start; see {log}")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Stop server.py; kill it if it does not exit within STOP_SECONDS."""
    if server.stdin:
        server.stdin.close()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
