"""What the benchmarks share: commands as processes of their own, servers, drawn photos, the line on the machine."""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import requests

PROJECT = Path(__file__).resolve().parent.parent
SECONDS = 90  # for a server to start, or to answer


def run(command: list, folder: Path = PROJECT, **settings: str) -> tuple[float, float, str]:
    """The seconds and the peak memory, in MB, of a Python command that has to succeed, and all it printed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=folder, env=os.environ | settings, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode, seconds = status, time.perf_counter() - start
        output.seek(0)
        text = output.read().decode()
    if status:
        sys.exit(f"{' '.join(map(str, command))}:\n{text}")
    return seconds, usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2), text


@contextlib.contextmanager
def serving(command: list[str], health: str, folder: Path = PROJECT, **settings: str) -> Iterator[str]:
    """Starts a server with a free port at the end of its command; gives its address when it answers at `health`."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, environment = f"http://127.0.0.1:{port}", os.environ | settings
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, str(port)],
            cwd=folder,
            env=environment,
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
            os.killpg(server.pid, 15)
            server.wait()


@contextlib.contextmanager
def both_servers(folder: Path) -> Iterator[dict[str, str]]:
    """Starts Prefect and MLflow for a copy of the project; gives the settings by which its runs find them."""
    prefect = ["prefect", "server", "start", "--no-prompt", "--port"]
    home = str(folder / "prefect_home")
    with (
        serving(prefect, "/api/health", folder, PREFECT_HOME=home) as prefect_url,
        serving(["mlflow", "server", "--port"], "/version", folder) as mlflow_url,
    ):
        yield {"PREFECT_API_URL": f"{prefect_url}/api", "MLFLOW_TRACKING_URI": mlflow_url}


def copy(folder: Path) -> Path:
    """The project as a fresh clone has it."""
    for name in ("sample_images", "workflow"):
        shutil.copytree(PROJECT / name, folder / name)
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def draw(folder: Path, count: int, size: int) -> Path:
    """A folder with `count` drawn photos a class, `size` pixels on the longer side."""
    run(["sample_images/draw.py", folder, "--count", count, "--size", size])
    return folder


def machine() -> str:
    names = ("tensorflow", "keras", "mlflow", "prefect", "pillow")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {system}, {packages}"
