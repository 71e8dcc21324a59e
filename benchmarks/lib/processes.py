"""Run commands and servers in processes, with their state in a folder."""

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

import psutil
import requests

MODEL = "models:/apples-oranges@champion"  # registered by a run on the lab's photos or the sample images
TIMEOUT_SECONDS = 90  # for a server to start or to respond
UNUSED_URL = "http://127.0.0.1:9"  # port 9 is reserved for the obsolete discard service


def choose_settings(state: Path, mlflow_url: str = UNUSED_URL, prefect_url: str = UNUSED_URL) -> dict[str, str | None]:
    """Return the environment variables of a run with its state in a folder and these servers, or none.

    None means that the variable must be unset, because it would select one of the user's servers.
    """
    return {
        "ML_WORKFLOW_STATE": str(state),
        "ML_WORKFLOW_MLFLOW_URL": mlflow_url,
        "ML_WORKFLOW_PREFECT_URL": prefect_url,
        "MLFLOW_TRACKING_URI": None,
        "PREFECT_API_URL": None,
    }


def run_python(command: list, folder: Path = PROJECT, **settings: str | None) -> tuple[float, float, str]:
    """Run Python with these arguments, and exit with its output if it fails.

    Args:
        command: the arguments of Python
        folder: the working directory
        settings: environment variables; None unsets a variable

    Returns:
        The seconds, the peak memory in MB, and the output.
    """
    environment = {name: value for name, value in (os.environ | settings).items() if value is not None}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=folder, env=environment, stdout=output, stderr=output
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
    """Run a Python server on a free port, and yield its URL.

    Args:
        command: the module and its arguments, up to the port
        health: the path that responds when the server is ready
        folder: the working directory
        settings: environment variables
    """
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
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
            deadline = time.monotonic() + TIMEOUT_SECONDS
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
            with contextlib.suppress(ProcessLookupError):  # it has exited
                os.killpg(server.pid, 15)
            server.wait()


def find_server(url: str) -> psutil.Process:
    """Return the child process that serves a URL."""
    port = url.split("/")[2].rpartition(":")[2]
    children = psutil.Process().children(recursive=False)
    return next(process for process in children if port in process.cmdline())


def measure_cpu_seconds(server: psutil.Process) -> float:
    """Return the CPU time that a server and its child processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in [server, *server.children(recursive=True)])


@contextlib.contextmanager
def start_both_servers(state: Path) -> Iterator[dict[str, str | None]]:
    """Run Prefect and MLflow with their data in a new folder, and yield the settings for runs that use them."""
    state.mkdir()
    prefect, home = ["prefect", "server", "start", "--no-prompt", "--port"], str(state / "prefect_home")
    with (
        start_server(prefect, "/api/health", state, PREFECT_HOME=home) as prefect_url,
        start_server(["mlflow", "server", "--workers", "1", "--port"], "/version", state) as mlflow_url,
    ):
        yield choose_settings(state, mlflow_url, prefect_url)
