"""Run the programs and their servers in processes, with all state in an empty folder."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distributed
import mlflow
import requests

PROJECT = Path(__file__).resolve().parent.parent.parent
SETTINGS = (  # prefixes of environment variables that tests do not inherit
    "ML_WORKFLOW_",
    "PREFECT_",
    "MLFLOW_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "DO_NOT_TRACK",
    "CI",
)
SECONDS = 600  # timeout of every wait, long enough for a busy machine


def free_port() -> int:
    """Return an unused port."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Project:
    """The programs with their state in a folder, and with separate ports for the servers that they look for.

    Args:
        folder: contains the state and the home folder
        databases: empty databases for the state folder, or None to let the programs create them, which takes 10 s
        mlflow_port: by default, an unused one
        prefect_port: by default, an unused one
    """

    def __init__(
        self,
        folder: Path,
        databases: Path | None = None,
        mlflow_port: int | None = None,
        prefect_port: int | None = None,
    ):
        self.folder, self.home = folder / "state", folder / "home"
        if databases and not self.folder.exists():
            shutil.copytree(databases, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        self.servers: dict[str, int] = {}
        self.mlflow_port, self.prefect_port = mlflow_port or free_port(), prefect_port or free_port()
        self.lab_url: str | None = None  # overrides the default source
        self.before = ""  # Python code that a program executes first

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment variables of a process of this project."""
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(SETTINGS)}
        variables = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # as in an activated environment
            "PYTHONPATH": str(PROJECT),
            "PYTHONFAULTHANDLER": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "ML_WORKFLOW_STATE": str(self.folder),
            "ML_WORKFLOW_MLFLOW_URL": f"http://127.0.0.1:{self.mlflow_port}",
            "ML_WORKFLOW_PREFECT_URL": f"http://127.0.0.1:{self.prefect_port}",
        }
        if self.lab_url:
            variables["ML_WORKFLOW_LAB_URL"] = self.lab_url
        return inherited | variables | settings

    def command(self, *arguments: str, script: str = "ml_workflow.py") -> list[str]:
        """Return the command line of a program."""
        if self.before:
            name = script.removesuffix(".py")
            return [sys.executable, "-u", "-c", f"{self.before}\nimport {name}\n{name}.main()", *arguments]
        return [sys.executable, "-u", str(PROJECT / script), *arguments]

    def run(
        self, *arguments: str, script="ml_workflow.py", timeout=SECONDS, **settings: str
    ) -> subprocess.CompletedProcess:
        """Run a program to its end."""
        return self.execute(self.command(*arguments, script=script), timeout, **settings)

    def execute(self, command: list[str], timeout=SECONDS, **settings: str) -> subprocess.CompletedProcess:
        """Run a command to its end; a traceback in its output fails the test."""
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

    def start(self, *arguments: str, script="ml_workflow.py", **settings: str) -> "Program":
        """Start a program in the background."""
        return Program(self.command(*arguments, script=script), self.folder, self.environment(**settings))

    @contextlib.contextmanager
    def server(self, command: list[str], health: str, **settings: str):
        """Run a server in the project folder; yield its URL when `health` responds."""
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
        """Send a signal to all processes of a server."""
        os.killpg(self.servers[name], number)

    def mlflow_server(self, *options: str):
        command = ["mlflow", "server", "--port", str(self.mlflow_port), "--workers", "1", *options]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves six processes
        return self.server(command, f"http://127.0.0.1:{self.mlflow_port}/version", **settings)

    @contextlib.contextmanager
    def scoring_server(self):
        """Serve the champion with MLflow; yield the URL for predictions."""
        port = free_port()
        model = ["-m", "models:/apples-oranges@champion", "--env-manager", "local"]
        command = ["mlflow", "models", "serve", *model, "-p", str(port)]
        timeout = {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": str(SECONDS)}
        with self.server(command, f"http://127.0.0.1:{port}/ping", **timeout):
            yield f"http://127.0.0.1:{port}/invocations"

    def prefect_server(self, home: str = "prefect_home", **settings: str):
        settings |= {
            "PREFECT_HOME": str(self.folder / home),
            "PREFECT_SERVER_API_PORT": str(self.prefect_port),
        }
        command = ["prefect", "server", "start", "--no-prompt"]
        return self.server(command, f"http://127.0.0.1:{self.prefect_port}/api/health", **settings)


class Program(subprocess.Popen):
    """A process whose output can be read while it runs."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        def heed_interrupts():  # background shells make programs ignore them
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
        """Read the output up to a line that matches the pattern."""
        for line in self.stdout:
            self.output += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"{pattern} is not in the output:\n{self.output}")

    def end(self, number: int | None = None) -> float:
        """Send the signal, if any, read the output to its end, and return the seconds until the process ended."""
        start = time.monotonic()
        if number:
            self.send_signal(number)
        try:
            self.output += self.communicate(timeout=SECONDS)[0]
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGABRT)  # prints the stack of each thread
            raise AssertionError(self.output + self.communicate()[0]) from None
        assert "Traceback" not in self.output, self.output
        return time.monotonic() - start


@contextlib.contextmanager
def dask_cluster(project: Project, folder: Path):
    """Run a scheduler and two workers in a folder without the project; yield the address and the worker processes."""
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
        with distributed.Client(address, timeout=SECONDS, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=SECONDS)
        yield address, processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Wait until the server at a URL responds."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.1)
    raise TimeoutError(url)


def runs_of(project: Project) -> list:
    """Return all MLflow runs of the project, the oldest first."""
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ml-workflow")
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))


def steps(project: Project, run, metric: str) -> list[int]:
    """Return the steps at which a run logged a metric."""
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    return sorted(entry.step for entry in client.get_metric_history(run.info.run_id, metric))


def check_whole(project: Project, run, epochs: int) -> None:
    """Check that a run is finished, with every epoch logged once and one registered version."""
    assert run.info.status == "FINISHED"
    for metric in ("loss", "val_accuracy"):
        assert steps(project, run, metric) == list(range(epochs))
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    assert len(client.search_model_versions(f"run_id = '{run.info.run_id}'")) == 1
    assert not (project.folder / "models" / run.info.run_id).exists()
    assert not list((project.folder / "models/.running").iterdir())
    rows = list(map(json.dumps, json.loads(artifact(project, run, "images.json").read_text())["data"]))
    assert len(rows) == len(set(rows)) > 0


def artifact(project: Project, run, name: str) -> Path:
    """Return the path of a run's artifact."""
    (path,) = project.folder.rglob(f"{run.info.run_id}/artifacts/{name}")
    return path


def weights(project: Project, run) -> str:
    """Return the digest of the weights that a run trained."""
    return hashlib.sha256(artifact(project, run, "weights/model.weights.h5").read_bytes()).hexdigest()


def prefect_states(url: str, kind: str) -> list[str]:
    """Return the states of all `flow_runs` or `task_runs`, the oldest first."""
    runs = requests.post(f"{url}/{kind}/filter", json={"sort": "EXPECTED_START_TIME_ASC"}, timeout=30).json()
    return [run["state_name"] for run in runs]


def fill(folder: Path) -> None:
    """Fill the disk of a folder with a file named `filler`."""
    with open(folder / "filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def run_together(count: int, program: str, folder: Path) -> None:
    """Run `count` processes with the same code at once, and check that all succeed."""

    def run(_) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, str(folder)]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)

    with ThreadPoolExecutor(count) as pool:
        ends = list(pool.map(run, range(count)))
    assert [end.returncode for end in ends] == [0] * count, [end.stderr for end in ends]
