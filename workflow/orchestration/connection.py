"""Which Prefect server a run talks to: the user's own, the one of this machine, or one that lives as long as the run.

Prefect is imported where it is used, because predict.py starts faster without it.
"""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from workflow.errors import WorkflowError, explain_os_errors
from workflow.orchestration.logs import RUN_LOGGERS, shorten_logged_errors
from workflow.servers import check_address, check_database, check_own_server, check_state_database, is_up, shell_command
from workflow.settings import settings

import requests
from filelock import FileLock

SERVER_PROGRAM = Path(__file__).with_name("server.py")
SERVER_SECONDS = 90  # to wait for a Prefect server of our own; most of it is for its new database


def connect_prefect() -> bool:
    """Connects Prefect to the user's own server, else to the one on this machine; False when there is neither.

    Then a run needs temporary_prefect_server().
    """
    from prefect.settings import get_current_settings

    shorten_logged_errors()
    if own := get_current_settings().api.url:
        check_own_server(f"{own}/health", "PREFECT_API_URL")
        return True
    check_address(settings.prefect_url, "ML_WORKFLOW_PREFECT_URL")
    remedy = "Prefect: free it, or set PREFECT_API_URL to your server"
    if is_up(f"{settings.prefect_url}/api/health", "true", remedy):
        use_prefect(settings.prefect_url)
        return True
    return False


def use_prefect(url: str) -> None:
    """Makes Prefect talk to the server at a URL. Links lead to settings.prefect_url, where the history is seen later.

    refresh_global_settings_context() is private (Prefect 3.8). prefect.settings.temporary_settings() is public, but
    does not reach the threads that send log lines.
    """
    from prefect.context import refresh_global_settings_context

    os.environ.update(PREFECT_API_URL=f"{url}/api", PREFECT_UI_URL=settings.prefect_url)
    refresh_global_settings_context()


@contextmanager
def temporary_prefect_server(home: Path) -> Iterator[str]:
    """Connects Prefect to a server with its history in `home`, which ends with the block, or with this process.

    Gives the URL of its UI. Raises WorkflowError when it does not start, or cannot have its database.
    """
    check_state_database(home / "prefect.db")
    with explain_os_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        (home / "server.log").touch()
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": url,  # Prefect lets the pages of all other sites ask it, too
    }
    with open(home / "server.log", "ab") as log, FileLock(home / ".lock"):  # the first server makes the database
        check_database(home / "prefect.db")  # another user's run may just have made it
        server = subprocess.Popen(
            [sys.executable, "-P", str(SERVER_PROGRAM), str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the run; the server ends after it
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        wait_for_server(server, url, home / "server.log")
    try:
        use_prefect(url)
        print(f"Prefect's UI while this run lasts: {url}", flush=True)
        yield url
    finally:
        for name in RUN_LOGGERS:
            for handler in logging.getLogger(name).handlers:
                handler.flush()  # Prefect sends its log lines late
        stop_server(server)


def wait_for_server(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Returns when the server answers; raises WorkflowError when it has ended or is not there in time."""
    deadline = time.monotonic() + SERVER_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"{url}/api/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.05)
    stop_server(server)
    raise WorkflowError(f"Prefect's server did not start: {log} says why")


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """Ends a server of server.py, by force if it takes more than ten seconds."""
    if server.stdin:
        server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def command_for_prefect(home: Path) -> str:
    """How to start a Prefect server that shows the history in `home`."""
    command = shell_command("-m", "prefect", "server", "start", "--no-prompt", PREFECT_HOME=home)
    return f"To look at it, start Prefect: {command}"
