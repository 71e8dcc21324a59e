"""Commands and servers as processes of their own, and the settings by which they keep their state in a folder."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lib import PROJECT

import requests

MODEL = "models:/apples-oranges@champion"  # what a run on the lab's or on drawn photos makes
SECONDS = 90  # for a server to start, or to answer
NOBODY = "http://127.0.0.1:9"  # nothing listens on this port, which is reserved for a service that nobody uses any more


def choose_settings(state: Path, mlflow_url: str = NOBODY, prefect_url: str = NOBODY) -> dict[str, str | None]:
    """The settings by which a run keeps all its state in a folder and uses these servers, or none.

    None stands for a variable that has to be unset, because it would lead the run to the user's own server.
    """
    return {
        "ML_WORKFLOW_STATE": str(state),
        "ML_WORKFLOW_MLFLOW_URL": mlflow_url,
        "ML_WORKFLOW_PREFECT_URL": prefect_url,
        "MLFLOW_TRACKING_URI": None,
        "PREFECT_API_URL": None,
    }


def run_python(command: list, **settings: str | None) -> tuple[float, float, str]:
    """The seconds and the peak memory, in MB, of a Python command that has to succeed, and all it printed.

    The command runs in the project's folder. A setting that is None is a variable that is unset.
    """
    environment = {name: value for name, value in (os.environ | settings).items() if value is not None}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=PROJECT, env=environment, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode, seconds = status, time.perf_counter() - start
        output.seek(0)
        text = output.read().decode()
    if status:
        sys.exit(f"{' '.join(map(str, command))}:\n{text}")
    return seconds, usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2), text


@contextlib.contextmanager
def start_server(command: list[str], health: str, folder: Path, **settings: str) -> Iterator[str]:
    """Starts a server in a folder, with a free port at the end of its command, and ends it after the block.

    Gives the server's address when it answers at `health`.
    """
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, str(port)],
            cwd=folder,
            env=os.environ | settings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline and server.poll() is None:
                with contextlib.suppress(requests.RequestException):
                    if requests.get(f"{url}{health}", timeout=5).ok:
                        break
                time.sleep(0.1)
            else:
                log.seek(0)
                sys.exit(f"{' '.join(command)} did not start:\n{log.read().decode()}")
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(server.pid, 15)
            server.wait()


@contextlib.contextmanager
def start_both_servers(state: Path) -> Iterator[dict[str, str | None]]:
    """Starts Prefect and MLflow with their histories in a new folder; gives the settings by which runs use them."""
    state.mkdir()
    prefect, home = ["prefect", "server", "start", "--no-prompt", "--port"], str(state / "prefect_home")
    with (
        start_server(prefect, "/api/health", state, PREFECT_HOME=home) as prefect_url,
        start_server(["mlflow", "server", "--port"], "/version", state) as mlflow_url,
    ):
        yield choose_settings(state, mlflow_url, prefect_url)
