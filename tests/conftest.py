"""Real parts for the tests: drawn photos, a web server for them with faults, copies of the project, servers."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "sample_images")]
import draw  # noqa: E402

SETTINGS = ("PREFECT_", "MLFLOW_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "DO_NOT_TRACK", "CI")
SECONDS = 180  # for a process to do anything at all


def pytest_collection_modifyitems(items):
    """Each row of the fault matrix, named by the markers survived and refused, goes with its test's report."""
    for item in items:
        for marker in item.iter_markers():
            if marker.name in ("survived", "refused"):
                item.user_properties += [(marker.name, name) for name in marker.args]


def pytest_terminal_summary(terminalreporter):
    """The fault matrix: each fault that was brought about, and what came of it."""
    rows = {
        name: outcome if report.passed else report.outcome
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call" or getattr(report, "outcome", None) in ("failed", "skipped")
        for outcome, name in getattr(report, "user_properties", ())  # none when a file cannot be read
    }
    if rows:
        terminalreporter.section("fault matrix")
        for name, outcome in sorted(rows.items()):
            terminalreporter.line(f"{outcome:9} {name}")
        terminalreporter.line(
            ", ".join([f"{len(rows)} faults", *(f"{n} {o}" for o, n in Counter(rows.values()).items())])
        )


class ImageServer(ThreadingHTTPServer):
    """Answers .../CLASS/FILE from a folder; `faults` maps a path to the faults of its next answers, in order."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), ImageHandler)
        self.folder, self.faults, self.requests, self.megabytes = folder, {}, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class ImageHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = "/".join(self.path.split("/")[-2:])
        self.server.requests.append((time.monotonic(), name))
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        path = self.server.folder / name
        body = path.read_bytes() if path.is_file() else b""
        if fault == "reset":  # linger 0: the client sees a reset connection, not an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault == "404" or not body:
            return self.answer(404, b"not found")
        if fault == "500":
            return self.answer(500, b"later")
        if fault == "429":
            return self.answer(429, b"slow down", {"Retry-After": "1"})
        if fault == "loop":
            return self.answer(302, b"", {"Location": self.path})
        if fault == "endless":
            return self.send_endlessly()
        if fault in ("drip", "stall"):
            return self.send_slowly(body, fault)
        if fault == "truncate":
            self.close_connection = True
            return self.answer(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
        bodies = {"html": b"<html>Please sign in</html>", "empty": b"", "garbage": bytes(b ^ 0x5A for b in body)}
        return self.answer(200, bodies.get(fault, body))

    def send_slowly(self, body: bytes, fault: str):
        """A byte every 50 ms for 5 s, or one byte and then nothing for 5 s."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has had enough
            for byte in body[: 100 if fault == "drip" else 1]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05 if fault == "drip" else 5)

    def send_endlessly(self):
        """512 MiB without a length, as far as the client takes them."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(512):
                self.wfile.write(bytes(2**20))
                self.server.megabytes += 1

    def answer(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_images(photo: Image.Image) -> dict[str, bytes]:
    """Whole images as few programs make them, by name; but for one-pixel.png and animated.gif all show the photo."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    transparent = photo.convert("RGBA")
    transparent.putalpha(photo.convert("L"))
    grey = np.asarray(photo.convert("L"), "uint16") * 257
    return {
        "png-inside.jpeg": encoded(photo, "PNG"),
        "cmyk.jpeg": encoded(photo.convert("CMYK"), "JPEG"),
        "grey-16-bit.png": encoded(Image.fromarray(grey), "PNG"),
        "palette-alpha.png": encoded(transparent.quantize(64), "PNG"),
        "upright.jpeg": encoded(photo, "JPEG", quality=98, subsampling=0),
        "turned.jpeg": encoded(turned, "JPEG", quality=98, subsampling=0, exif=exif),
        "one-pixel.png": encoded(photo.resize((1, 1)), "PNG"),
        "animated.gif": encoded(photo, "GIF", save_all=True, append_images=[Image.new("RGB", photo.size, "blue")]),
    }


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """The bytes with some changed, cut off, doubled or put in elsewhere."""
    body = bytearray(content)
    for _ in range(random.integers(1, 6)):
        at, length = random.integers(len(body)), int(random.integers(1, 40))
        match random.integers(5):
            case 0:
                body[at] = random.integers(256)
            case 1:
                body[at : at + length] = random.bytes(length)
            case 2:
                body[at:at] = random.bytes(length)
            case 3:
                del body[at : at + length]
            case 4:
                del body[max(at, 20) :]
    return bytes(body)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A drawn data set under the lab's names; as in the lab's, some of the .jpeg files are PNGs inside."""
    folder = tmp_path_factory.mktemp("photos")
    for kind in ("apples", "oranges"):
        (folder / kind).mkdir()
        for number in range(1, 11):
            image = draw.draw(kind, 160, np.random.default_rng([4, len(kind), number]))
            image.save(folder / kind / f"{kind[:-1]}-{number}.jpeg", "PNG" if number > 7 else "JPEG")
    return folder


@pytest.fixture
def image_server(photos):
    with closing_server(ImageServer(photos)) as server:
        yield server


@contextlib.contextmanager
def closing_server(server: ThreadingHTTPServer):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Copy:
    """A copy of the project in an empty folder, which looks for its servers on ports of its own, or on those given."""

    def __init__(self, folder: Path, mlflow_port: int | None = None, prefect_port: int | None = None):
        self.folder, self.home = folder / "ml_workflow", folder / "home"
        self.home.mkdir(parents=True)
        self.servers = {}
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("sample_images", "workflow"):
            shutil.copytree(PROJECT / name, self.folder / name, ignore=ignored)
        for path in [
            *PROJECT.glob("*.py"),
            *(PROJECT / name for name in ("pyproject.toml", "MLproject", "python_env.yaml")),
        ]:
            shutil.copy(path, self.folder)
        self.mlflow_port, self.prefect_port = mlflow_port or free_port(), prefect_port or free_port()
        for name in ("ml_workflow.py", "predict.py"):
            self.replace(name, "127.0.0.1:5000", f"127.0.0.1:{self.mlflow_port}")
        self.replace("workflow/running/tracking.py", "127.0.0.1:4200", f"127.0.0.1:{self.prefect_port}")

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(SETTINGS)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
        own = {"HOME": str(self.home), "PATH": path, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        own |= {"PYTHONFAULTHANDLER": "1"}
        return kept | own | settings

    def run(
        self, *arguments: str, script="ml_workflow.py", timeout=SECONDS, **settings: str
    ) -> subprocess.CompletedProcess:
        return self.execute([sys.executable, script, *arguments], timeout, **settings)

    def execute(self, command: list[str], timeout=SECONDS, **settings: str) -> subprocess.CompletedProcess:
        end = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert "Traceback" not in end.stdout + end.stderr, end.stdout + end.stderr
        return end

    def start(self, *arguments: str, **settings: str) -> "Program":
        """A training run in the background."""
        return Program([sys.executable, "-u", "ml_workflow.py", *arguments], self.folder, self.environment(**settings))

    @contextlib.contextmanager
    def server(self, command: list[str], health: str, **settings: str):
        """A server as a person starts it in the project folder; it is up when `health` answers."""
        with open(self.home / f"{command[0]}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.folder,
                env=self.environment(**settings),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.servers[command[0]] = process.pid
        try:
            wait_for(health, process)
            yield health.rpartition("/")[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)

    def signal_server(self, name: str, number: int) -> None:
        os.killpg(self.servers[name], number)

    def mlflow_server(self, *options: str):
        command = ["mlflow", "server", "--port", str(self.mlflow_port), "--workers", "1", *options]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # six more processes, for what nobody uses here
        return self.server(command, f"http://127.0.0.1:{self.mlflow_port}/version", **settings)

    @contextlib.contextmanager
    def scoring_server(self):
        """The champion as a person serves it; gives the URL that answers."""
        port = free_port()
        model = ["-m", "models:/apples-oranges@champion", "--env-manager", "local"]
        with self.server(["mlflow", "models", "serve", *model, "-p", str(port)], f"http://127.0.0.1:{port}/ping"):
            yield f"http://127.0.0.1:{port}/invocations"

    def prefect_server(self, home: str = "prefect_home"):
        settings = {
            "PREFECT_HOME": str(self.folder / home),
            "PREFECT_SERVER_API_PORT": str(self.prefect_port),
        }
        command = ["prefect", "server", "start", "--no-prompt"]
        return self.server(command, f"http://127.0.0.1:{self.prefect_port}/api/health", **settings)


class Program(subprocess.Popen):
    """A process whose output is read while it runs."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        def heed_interrupts():  # a shell in the background has its programs ignore them
            signal.signal(signal.SIGINT, signal.default_int_handler)

        super().__init__(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_interrupts,
        )
        self.output = ""

    def read_until(self, pattern: str) -> None:
        """Returns when a line of the output has the pattern."""
        for line in self.stdout:
            self.output += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"{pattern} is not in the output:\n{self.output}")

    def end(self, number: int | None = None) -> float:
        """Sends the signal, if one is given, and reads the output to its end; the seconds until the process ended."""
        start = time.monotonic()
        if number:
            self.send_signal(number)
        try:
            self.output += self.communicate(timeout=SECONDS)[0]
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGABRT)  # tells where each thread waits
            raise AssertionError(self.output + self.communicate()[0]) from None
        assert "Traceback" not in self.output, self.output
        return time.monotonic() - start


@contextlib.contextmanager
def dask_cluster(project: Copy, folder: Path):
    """A scheduler and two workers, as a person starts them, in a folder without the project; gives its address."""
    address = f"tcp://127.0.0.1:{free_port()}"
    scheduler = ["scheduler", "--host", address, "--dashboard-address", "127.0.0.1:0"]
    worker = ["worker", address, "--host", "127.0.0.1", "--nthreads", "2", "--no-nanny", "--no-dashboard"]
    processes = []
    with open(folder / "dask.log", "ab") as log:
        for command in (scheduler, worker, worker):
            processes += [
                subprocess.Popen(
                    [str(Path(sys.executable).with_name("dask")), *command],
                    cwd=folder,
                    env=project.environment(),
                    stdout=log,
                    stderr=log,
                )
            ]
    try:
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.1)
    raise TimeoutError(url)


def runs_of(project: Copy) -> list:
    """All MLflow runs of the project, the oldest first."""
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ml-workflow")
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))


def steps(project: Copy, run, metric: str) -> list[int]:
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    return sorted(entry.step for entry in client.get_metric_history(run.info.run_id, metric))


def check_whole(project: Copy, run, epochs: int) -> None:
    """The run is finished, has each epoch once, and a registered version."""
    assert run.info.status == "FINISHED"
    for metric in ("loss", "val_accuracy"):
        assert steps(project, run, metric) == list(range(epochs))
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    assert len(client.search_model_versions(f"run_id = '{run.info.run_id}'")) == 1
    folder = project.folder / "models" / run.info.run_id
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("training.", "."))]
    assert not list((project.folder / "models/.unfinished").iterdir())
    tables = list(project.folder.rglob(f"{run.info.run_id}/artifacts/images.json"))
    assert tables
    rows = [json.dumps(row) for table in tables for row in json.loads(table.read_text())["data"]]
    assert len(rows) == len(set(rows))  # an earlier process of the run may have logged them already


def weights(project: Copy, run) -> str:
    path = project.folder / "models" / run.info.run_id / "model.weights.h5"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prefect_states(url: str, kind: str) -> list[str]:
    runs = requests.post(f"{url}/{kind}/filter", json={"sort": "EXPECTED_START_TIME_ASC"}, timeout=30).json()
    return [run["state_name"] for run in runs]


@pytest.fixture
def project(tmp_path) -> Copy:
    return Copy(tmp_path)


def fill(folder: Path) -> None:
    """Leaves no room on the disk of the folder, until its file `filler` is gone."""
    with open(folder / "filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory):
    """A Prefect server for all that do not test Prefect: its address, as a setting."""
    with Copy(tmp_path_factory.mktemp("prefect")).prefect_server() as url:
        yield {"PREFECT_API_URL": url}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos, prefect) -> Copy:
    """A copy of the project with a champion, and no server."""
    project = Copy(tmp_path_factory.mktemp("trained"))
    end = project.run("--source", str(photos), **prefect)
    assert "is the champion" in end.stdout, end.stderr
    return project


@pytest.fixture
def unused_port() -> int:
    return free_port()
