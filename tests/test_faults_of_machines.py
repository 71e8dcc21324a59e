"""Faults of machines: settings of libraries, the current folder, closed streams, suspended programs, unusual paths."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from support.project import PROJECT, Project, free_port, runs_of
from workflow import files
from workflow.errors import WorkflowError
from workflow.orchestration import cluster, connection
from workflow.orchestration.connection import describe_servers
from workflow.serving.registered_model import find_champions, resolve
from workflow.settings import Settings, settings
from workflow.tracking.connection import connect_mlflow

import mlflow
import pytest
import requests
from filelock import FileLock

FOREIGN_URL = "http://127.0.0.1:9/api"  # nothing listens there
MODULES = ("keras", "mlflow", "multiprocessing", "numpy", "prefect", "uvicorn", "workflow")
AMBIENT = {  # documented variables of Python and the libraries, whose values could stop a program or change a result
    "CUDA_VISIBLE_DEVICES": "none",
    "DASK_DISTRIBUTED__WORKER__DAEMON": "x",
    "HOME": "/nonexistent",
    "KERAS_BACKEND": "torch",
    "LC_ALL": "C",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "x",
    "MPLBACKEND": "unknown",
    "MPLCONFIGDIR": "/nonexistent",
    "OMP_NUM_THREADS": "x",
    "PREFECT_PROFILE": "missing",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
    "PREFECT_TASKS_DEFAULT_PERSIST_RESULT": "true",
    "PYTHONSAFEPATH": "1",
    "PYTHONWARNINGS": "error",
    "TF_DETERMINISTIC_OPS": "x",
    "TF_FORCE_GPU_ALLOW_GROWTH": "x",
    "TF_NUM_INTEROP_THREADS": "x",
    "TMPDIR": "/nonexistent",
    "XLA_FLAGS": "--no_such_flag=1",
}


class OddProject(Project):
    """A copy of the project at an odd path, started in another project's folder, without an activated environment."""

    def __init__(self, folder: Path, databases: Path):
        super().__init__(folder)
        self.copy, self.foreign = folder / """it's a "project" $HOME é""", folder / "photos of 'others'"
        self.foreign.mkdir()
        (self.foreign / ".env").write_text(f"PREFECT_API_URL={FOREIGN_URL}\nPREFECT_LOGGING_LEVEL=none\n")
        (self.foreign / "prefect.toml").write_text("[broken")
        (self.foreign / "pyproject.toml").write_text(f"[tool.prefect.api]\nurl = '{FOREIGN_URL}'\n")
        (self.foreign / "matplotlibrc").write_text("font.size: 77\nbroken\n")
        for name in MODULES:
            program = f"open({str(self.foreign / f'ran-{name}')!r}, 'w'); raise SystemExit('foreign {name}')"
            (self.foreign / f"{name}.py").write_text(program)
        shutil.copytree(databases, self.copy)
        shutil.copytree(PROJECT / "workflow", self.copy / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
        for program in PROJECT.glob("*.py"):
            shutil.copy(program, self.copy)

    def environment(self, **settings: str) -> dict[str, str]:
        variables = super().environment(**settings) | {"PATH": "/usr/local/bin:/usr/bin:/bin"} | settings
        return {name: value for name, value in variables.items() if name not in ("PYTHONPATH", "ML_WORKFLOW_STATE")}

    def shell(self, command: str, **settings: str) -> subprocess.CompletedProcess:
        """Run a command in the foreign folder, as a user's shell does."""
        end = subprocess.run(
            ["bash", "-c", command],
            cwd=self.foreign,
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            errors="backslashreplace",
        )
        assert "Traceback" not in end.stdout + end.stderr, end.stdout + end.stderr
        assert not list(self.foreign.glob("ran-*"))
        return end

    def program(self, name: str, *arguments: str) -> str:
        return shlex.join([sys.executable, str(self.copy / name), *arguments])


@pytest.fixture(scope="module")
def odd(tmp_path_factory, photos, databases) -> tuple[OddProject, subprocess.CompletedProcess]:
    """A run of an odd project, with odd names of photos and in an odd environment."""
    project = OddProject(tmp_path_factory.mktemp("odd"), databases)
    source = project.foreign / "a b"
    shutil.copytree(photos, source)
    for path in [path for path in source.rglob("*.jpeg")]:
        path.rename(path.with_name(f"""it's "{path.stem}" $1 `x`.jpeg"""))
    keras = project.home / ".keras"
    keras.mkdir()
    (keras / "keras.json").write_text(
        '{"floatx": "float16", "epsilon": 0.5, "backend": "torch", "image_data_format": "channels_first"}'
    )
    command = project.program("ml_workflow.py", "--source", "a b", "--epochs", "2")
    return project, project.shell(command, KERAS_HOME=str(keras), **AMBIENT)


@pytest.mark.survived(
    "folder: another project's .env, prefect.toml and matplotlibrc in the current folder",
    "folder: another project's modules in the current folder",
    "environment: keras.json with another backend, float type and image format",
    "environment: a project at a path with spaces, quotes and dollar signs",
    *[f"environment: {name}={value}" for name, value in AMBIENT.items()],
)
def test_run_ignores_foreign_settings_and_modules(odd):
    _, end = odd
    assert end.returncode == 0, end.stderr
    assert "was promoted to champion" in end.stdout
    assert FOREIGN_URL not in end.stdout + end.stderr
    assert "constrained_layout" not in end.stderr


def printed_command(end: subprocess.CompletedProcess, label: str) -> str:
    """Return the command in the line of a run's output that begins with the label."""
    return re.search(rf"^{re.escape(label)}: (.*)$", end.stdout, re.MULTILINE)[1]


@pytest.mark.survived("names: a printed command with spaces, quotes and dollar signs in paths")
def test_printed_predict_command_works_as_printed(odd):
    project, end = odd
    predicted = project.shell(printed_command(end, "Predict"))
    assert predicted.returncode == 0, predicted.stderr
    assert len(predicted.stdout.splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "health"),
    [
        ("To see the runs, start MLflow", "{mlflow}/version"),
        pytest.param("To see the flow runs, start Prefect", "{prefect}/api/health", marks=pytest.mark.slow),
        pytest.param("Serve", "http://127.0.0.1:{port}/ping", marks=pytest.mark.slow),
        pytest.param("Try it in a browser", "http://127.0.0.1:{port}/health", marks=pytest.mark.slow),
    ],
)
@pytest.mark.survived("environment: printed commands of servers, without an activated environment")
def test_printed_server_command_serves_the_printed_address(odd, label, health):
    project, end = odd
    port = free_port()
    command = printed_command(end, label).replace("-p 5001", f"-p {port}")  # the only change: a free port
    command += f" --port {port}" if "serve.py" in command else ""
    with open(project.home / "server.log", "ab") as log:
        server = subprocess.Popen(
            ["bash", "-c", command],
            cwd=project.foreign,
            env=project.environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    addresses = {name: f"http://127.0.0.1:{getattr(project, f'{name}_port')}" for name in ("mlflow", "prefect")}
    try:
        assert responds(health.format(port=port, **addresses), server), (project.home / "server.log").read_text()
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)
    assert not list(project.foreign.glob("ran-*"))


def responds(url: str, process: subprocess.Popen) -> bool:
    """Return whether the server responds before its process ends."""
    while process.poll() is None:
        try:
            if requests.get(url, timeout=5).ok:
                return True
        except requests.RequestException:
            time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        pytest.param("2>&-", 0, "", marks=pytest.mark.survived("streams: standard error is closed")),
        pytest.param(
            ">/dev/full", 1, "No space left on device", marks=pytest.mark.refused("streams: output to a full device")
        ),
        pytest.param(
            "--json >/dev/full",
            1,
            "No space left on device",
            marks=[pytest.mark.slow, pytest.mark.refused("streams: JSON to a full device")],
        ),
        pytest.param("--json 2>/dev/full", 0, "", marks=pytest.mark.survived("streams: errors to a full device")),
        pytest.param(
            "<&- >&- 2>&-",
            0,
            "",
            marks=[pytest.mark.slow, pytest.mark.survived("streams: all standard streams are closed")],
        ),
    ],
)
def test_closed_or_full_stream_ends_without_a_traceback(odd, redirection, status, message):
    project, _ = odd
    photo = next((project.foreign / "a b/apples").iterdir())
    end = project.shell(f"{project.program('predict.py', str(photo))} {redirection}")
    assert end.returncode == status, end.stderr
    assert message in end.stderr


@pytest.mark.slow
@pytest.mark.survived("streams: the log of a run to a full device")
def test_run_succeeds_if_its_log_cannot_be_written(project):
    command = shlex.join(project.command("--source", str(PROJECT / "sample_images"), "--epochs", "1"))
    assert project.execute(["bash", "-c", f"{command} 2>/dev/full"]).returncode == 0
    assert len(runs_of(project)) == 1


@pytest.mark.slow
@pytest.mark.survived("environment: python -OO, which removes docstrings")
@pytest.mark.parametrize("name", ["ml_workflow.py", *(pytest.param(f, marks=pytest.mark.slow) for f in ("tune.py",))])
def test_programs_work_without_docstrings(project, name):
    end = project.execute([sys.executable, "-OO", str(PROJECT / name), "--help"])
    assert "--source" in end.stdout


def make_file(path: Path, content: str) -> str:
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("PREFECT_LOGGING_LEVEL", "x", marks=pytest.mark.refused("environment: PREFECT_LOGGING_LEVEL=x")),
        pytest.param(
            "PREFECT_API_REQUEST_TIMEOUT",
            "x",
            marks=[pytest.mark.slow, pytest.mark.refused("environment: PREFECT_API_REQUEST_TIMEOUT=x")],
        ),
        pytest.param(
            "PREFECT_PROFILES_PATH", "active = '", marks=pytest.mark.refused("environment: a broken profiles.toml")
        ),
        *(
            pytest.param(name, "/nonexistent.pem", marks=pytest.mark.refused(f"environment: {name} is missing"))
            for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
        ),
    ],
)
def test_invalid_variable_is_reported_in_one_line(project, tmp_path, name, value):
    if name == "PREFECT_PROFILES_PATH":
        value = make_file(tmp_path / "profiles/profiles.toml", value)
    end = project.execute([sys.executable, str(PROJECT / "ml_workflow.py"), "--source", "x"], **{name: value})
    assert end.returncode == 1
    assert end.stderr.count("\n") == 1
    assert value in end.stderr if "PROFILES" in name else name in end.stderr


@pytest.mark.refused("folder: the current folder was deleted")
def test_deleted_current_folder_is_reported(project):
    command = shlex.join([sys.executable, str(PROJECT / "predict.py"), "x"])
    end = project.execute(["bash", "-c", f"mkdir gone; cd gone; rmdir ../gone; {command}"])
    assert end.returncode == 1
    assert end.stderr.count("\n") == 1
    assert "current folder" in end.stderr


@pytest.mark.slow
@pytest.mark.refused("environment: a Prefect profile names a server that is down")
def test_address_in_a_profile_is_removed_by_the_printed_command(project, tmp_path):
    text = f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{FOREIGN_URL}"\n'
    variables = {"PREFECT_PROFILES_PATH": make_file(tmp_path / "profiles/profiles.toml", text)}
    program = (
        "from workflow.orchestration import connection\n"
        "try: print(connection.connect_prefect())\n"
        "except connection.WorkflowError as error: print(error)"
    )
    message = project.execute([sys.executable, "-c", program], **variables).stdout
    assert "profile mine" in message
    removed = project.execute(["bash", "-c", message.partition("remove it: ")[2]], **variables)
    assert removed.returncode == 0, removed.stderr
    assert project.execute([sys.executable, "-c", program], **variables).stdout == "False\n"


@pytest.fixture
def registered(tmp_path, databases, monkeypatch) -> str:
    """Select an empty tracking store; return the URI of the state folder's database, where a model is registered."""
    (tmp_path / "state").mkdir()
    own = f"sqlite:///{shutil.copy(databases / 'mlflow.db', tmp_path / 'state')}"
    mlflow.MlflowClient(own).create_registered_model("apples-oranges")
    monkeypatch.setattr(settings, "state", tmp_path / "state")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(databases / 'mlflow.db', tmp_path)}")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return own


@pytest.mark.refused("environment: MLFLOW_REGISTRY_URI selects another store")
@pytest.mark.parametrize("registry", ["http://127.0.0.1:9", "databricks-uc", "uc:x", "folder", "sqlite:///other.db"])
def test_other_registry_is_reported_before_a_run(registered, monkeypatch, registry):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    with pytest.raises(WorkflowError, match=rf"^MLFLOW_REGISTRY_URI={registry} .*unset MLFLOW_REGISTRY_URI"):
        connect_mlflow("http://127.0.0.1:9", settings.state, "ml-workflow")


@pytest.mark.survived("environment: MLFLOW_REGISTRY_URI selects the same store")
def test_registry_in_the_tracking_store_is_used(registered, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "sqlite:///mlflow.db")
    connect_mlflow("http://127.0.0.1:9", settings.state)


@pytest.mark.refused("MLflow: another user's server responds, and the models are in this folder's database")
@pytest.mark.parametrize("find", [find_champions, lambda: resolve("models:/apples-oranges@champion")])
def test_message_names_the_store_where_models_are_registered(registered, find):
    with pytest.raises(WorkflowError) as error:
        find()
    assert str(mlflow.get_tracking_uri()) in str(error.value)
    assert "apples-oranges" in str(error.value)
    remedy = shlex.split(str(error.value).partition("MLFLOW_TRACKING_URI=")[2])[0]
    assert remedy == registered
    assert mlflow.MlflowClient(remedy, remedy).search_registered_models()


def test_custom_ports_print_no_advice(monkeypatch, tracking_uri):
    defaults = Settings.model_fields
    mlflow.set_tracking_uri(defaults["mlflow_url"].default)
    advised = describe_servers(has_prefect=False)
    for name, value in re.findall(r"ML_WORKFLOW_(\w+)=(\S+)", advised):
        monkeypatch.setattr(settings, name.lower(), value)
    mlflow.set_tracking_uri(settings.mlflow_url)
    assert "ML_WORKFLOW" in advised
    assert "ML_WORKFLOW" not in describe_servers(has_prefect=False)
    assert str(settings.prefect_url).rpartition(":")[2] in connection.prefect_command(Path("home"))


@pytest.mark.refused("environment: MLFLOW_TRACKING_URI=postgresql://... without its driver")
def test_missing_database_driver_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+nodriver://ann:hunter2@127.0.0.1/x")
    for uri in ("postgresql+pg8000://ann:hunter2@127.0.0.1:9/x", "mysql+pymysql://ann:hunter2@127.0.0.1:9/x"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        with pytest.raises(WorkflowError, match="MLFLOW_TRACKING_URI") as error:
            connect_mlflow("http://127.0.0.1:9", tmp_path)
        assert "hunter2" not in str(error.value)


@pytest.mark.refused("environment: `mlflow run` ignores ML_WORKFLOW_MLFLOW_URL")
def test_run_of_mlflow_in_another_database_is_reported(monkeypatch, tmp_path, registered):
    monkeypatch.setattr(settings, "mlflow_url", "http://127.0.0.1:1")
    monkeypatch.setattr(settings, "__pydantic_fields_set__", {"mlflow_url"})
    connect_mlflow(settings.mlflow_url, settings.state)
    monkeypatch.setenv("MLFLOW_RUN_ID", "1")
    with pytest.raises(WorkflowError, match="mlflow run") as error:
        connect_mlflow(settings.mlflow_url, settings.state)
    remedy = shlex.split(str(error.value).partition("MLFLOW_TRACKING_URI=")[2])[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", remedy)
    mlflow.set_tracking_uri(remedy)
    connect_mlflow(settings.mlflow_url, settings.state)


@pytest.mark.refused("disk: a folder whose name is not UTF-8")
def test_state_folder_that_is_not_utf8_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(WorkflowError, match=r"udce9.*ML_WORKFLOW_STATE"):
        connect_mlflow("http://127.0.0.1:1", tmp_path / os.fsdecode(b"caf\xe9"))


@pytest.mark.slow
@pytest.mark.refused("wait: --dask with the address of a server that is not a scheduler")
def test_other_server_is_not_accepted_as_dask_scheduler(image_server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (image_server.server_port, silent.getsockname()[1]):
            start = time.monotonic()
            with pytest.raises(WorkflowError, match="dask scheduler"), cluster.workers(f"tcp://127.0.0.1:{port}"):
                pass
            assert time.monotonic() - start < 30


@pytest.mark.survived("wait: a suspended program holds a lock")
def test_wait_for_a_lock_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "SILENT_SECONDS", 0.1)
    is_held = threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / "lock"):
            is_held.set()
            time.sleep(1)

    threading.Thread(target=hold).start()
    is_held.wait()
    with files.locked(tmp_path / "lock"):
        assert str(tmp_path / "lock") in capsys.readouterr().err
