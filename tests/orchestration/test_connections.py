"""Programs use the right servers and databases, and report unusable ones."""

import errno
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.project import PROJECT, run_together
from workflow import servers
from workflow.cli import shell_command
from workflow.errors import WorkflowError
from workflow.orchestration import connection
from workflow.orchestration.connection import connect_prefect, temporary_prefect_server, use_prefect
from workflow.servers import is_up
from workflow.settings import Settings, find_unusable_proxy, settings
from workflow.tracking.connection import connect_mlflow

import mlflow
import pytest
import requests
from prefect.context import refresh_global_settings_context
from prefect.settings import get_current_settings

NO_SERVER = "http://127.0.0.1:1"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder for the tracking database, where no MLflow server runs."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def prefect_settings(monkeypatch):
    """Restore Prefect's settings after a test."""
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setenv("PREFECT_UI_URL", "")
    yield
    monkeypatch.undo()
    refresh_global_settings_context()


def test_port_where_nothing_listens_is_free(unused_port):
    assert is_up(f"http://127.0.0.1:{unused_port}/version", ".*", "MLflow", "X") is False


def test_port_of_another_program_is_reported(store, image_server):
    with pytest.raises(WorkflowError, match=f"port {image_server.server_port} .*MLFLOW_TRACKING_URI"):
        connect_mlflow(image_server.url, store, "test")


@pytest.mark.refused("server: it is too busy to respond")
def test_server_that_does_not_respond_in_time_is_reported(monkeypatch):
    monkeypatch.setattr(servers, "TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(WorkflowError, match=r"did not respond.*repeat.*PREFECT_API_URL"):
            is_up(url, "true", "Prefect", "PREFECT_API_URL")


@pytest.mark.refused("server: its address is invalid")
@pytest.mark.parametrize("url", ["http://127.0.0.1:50033333", "http://127.0.0.1:5o03", "127.0.0.1:5003", "localhost"])
def test_invalid_address_is_reported_with_its_variable(store, prefect_settings, monkeypatch, url):
    with pytest.raises(WorkflowError, match=f"ML_WORKFLOW_MLFLOW_URL .*{url}"):
        connect_mlflow(url, store)
    monkeypatch.setattr(settings, "prefect_url", url)
    with pytest.raises(WorkflowError, match=f"ML_WORKFLOW_PREFECT_URL .*{url}"):
        connect_prefect()


@pytest.mark.refused("disk: its file system has no locks")
def test_file_system_without_locks_is_reported_before_a_run(store, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(WorkflowError, match="locks; set ML_WORKFLOW_STATE"):
        connect_mlflow(NO_SERVER, store, "test")


def test_imported_prefect_uses_the_new_connection(prefect_settings):
    use_prefect("http://127.0.0.1:1")
    assert get_current_settings().api.url == "http://127.0.0.1:1/api"
    assert get_current_settings().ui_url == settings.prefect_url


def test_telemetry_of_every_library_is_off():
    from mlflow.telemetry.utils import is_telemetry_disabled
    from prefect.analytics import is_telemetry_enabled

    assert not is_telemetry_enabled()
    assert is_telemetry_disabled()
    assert not get_current_settings().server.analytics_enabled


@pytest.mark.slow
def test_other_websites_cannot_use_the_server_of_a_run(tmp_path, prefect_settings):
    with temporary_prefect_server(tmp_path / "home") as url:
        allowed = {}
        for origin in (url, "http://elsewhere.example"):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            response = requests.options(f"{url}/api/flow_runs/filter", headers=headers, timeout=5)
            allowed[origin] = response.headers.get("Access-Control-Allow-Origin")
    assert allowed == {url: url, "http://elsewhere.example": None}


@pytest.mark.slow
def test_server_of_a_killed_run_ends(tmp_path):
    program = (
        "import sys, pathlib, time\n"
        "from workflow.orchestration.connection import temporary_prefect_server\n"
        "with temporary_prefect_server(pathlib.Path(sys.argv[1])) as url:\n"
        "    print(url, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "home")]
    run = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    with run:
        url = run.stdout.readline().split()[-1]
        assert requests.get(f"{url}/api/health", timeout=5).text == "true"
        os.kill(run.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_up(f"{url}/api/health", "true", "Prefect", "X"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_server_that_cannot_start_is_reported_with_its_log(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text("raise SystemExit('no server today')")
    monkeypatch.setattr(connection, "SERVER_PROGRAM", tmp_path / "program.py")
    with (
        pytest.raises(WorkflowError, match=r"server\.log"),
        temporary_prefect_server(tmp_path / "home"),
    ):
        pass
    assert "no server today" in (tmp_path / "home/server.log").read_text()


def test_experiment_that_only_a_server_can_write_is_reported(store):
    connect_mlflow(NO_SERVER, store, "other")
    mlflow.create_experiment("test", artifact_location="mlflow-artifacts:/7")
    with pytest.raises(WorkflowError, match="`mlflow server`"):
        connect_mlflow(NO_SERVER, store, "test")


def test_description_of_the_experiment_is_written_once(store):
    connect_mlflow(NO_SERVER, store, "test")
    client, experiment = mlflow.MlflowClient(), mlflow.get_experiment_by_name("test")
    assert "chart view" in experiment.tags["mlflow.note.content"]
    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "")  # as a user who clears it does
    connect_mlflow(NO_SERVER, store, "test")
    assert client.get_experiment(experiment.experiment_id).tags["mlflow.note.content"] == ""


@pytest.mark.slow
def test_three_first_servers_share_a_folder(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from workflow.orchestration.connection import temporary_prefect_server\n"
        "with temporary_prefect_server(pathlib.Path(sys.argv[1])): pass\n"
    )
    run_together(3, program, tmp_path / "home")


@pytest.mark.survived("proxy: a server on this machine at its IPv6 address")
def test_servers_on_this_machine_bypass_proxies():
    program = (
        "import workflow, httpx, requests\n"
        "client = httpx.Client()\n"
        "for url in ('http://127.0.0.1:5000', 'http://localhost:5000', 'http://[::1]:5000'):\n"
        "    direct = client._transport_for_url(httpx.URL(url)) is client._transport\n"
        "    print(direct, requests.utils.should_bypass_proxies(url, None))"
    )
    for name in ("NO_PROXY", "no_proxy"):
        environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", name: "intranet"}
        end = subprocess.run(
            [sys.executable, "-c", program], cwd=PROJECT, env=environment, capture_output=True, text=True
        )
        assert end.stdout == 3 * "True True\n", end.stderr


def test_damaged_database_is_reported_in_one_line(store):
    (store / "mlflow.db").write_text("not a database at all, whatever its name says")
    with pytest.raises(WorkflowError, match=r"MLflow at sqlite:.*not a database"):
        connect_mlflow(NO_SERVER, store, "test")


def make_unreadable(file: Path) -> None:
    """Create a file that cannot be opened; for root, who can open every file, a folder in its place."""
    file.parent.mkdir(exist_ok=True)
    if os.geteuid():
        file.touch(0)
    else:
        file.mkdir()


@pytest.mark.refused("disk: mlflow.db cannot be opened, because it is another user's")
@pytest.mark.parametrize("experiment", ["test", None])  # predict.py has none
def test_unreadable_mlflow_database_is_reported_at_once(store, experiment, monkeypatch):
    make_unreadable(store / "mlflow.db")
    if experiment is None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}?timeout=9")
        mlflow.set_tracking_uri(None)
    start = time.monotonic()
    with pytest.raises(WorkflowError, match=r"mlflow\.db .*ML_WORKFLOW_STATE"):
        connect_mlflow(NO_SERVER, store, experiment)
    assert time.monotonic() - start < 10  # MLflow itself would try for 100 s


@pytest.mark.refused("disk: prefect.db cannot be opened, because it is another user's")
def test_unreadable_prefect_database_is_reported_at_once(tmp_path, monkeypatch):
    make_unreadable(tmp_path / "home/prefect.db")
    monkeypatch.setattr(subprocess, "Popen", None)  # which would start it
    message = r"prefect\.db .*ML_WORKFLOW_STATE"
    with pytest.raises(WorkflowError, match=message), temporary_prefect_server(tmp_path / "home"):
        pass


@pytest.mark.parametrize(
    ("value", "state"), [("", PROJECT), ("~/x", Path.home() / "x"), ("y", Path.cwd() / "y"), ("/z/", Path("/z"))]
)
def test_state_folder_is_absolute_and_empty_settings_are_ignored(monkeypatch, value, state):
    monkeypatch.setenv("ML_WORKFLOW_STATE", value)
    monkeypatch.setenv("ML_WORKFLOW_LAB_URL", "http://127.0.0.1/lab/")
    assert Settings().state == state
    assert Settings().lab_url == "http://127.0.0.1/lab"


@pytest.mark.survived("proxy: NO_PROXY with entries that httpx cannot read")
def test_unreadable_entries_of_no_proxy_are_removed():
    program = "import workflow, os, httpx; httpx.Client(); print(os.environ['NO_PROXY'])"
    kept = "intranet,10.0.0.0/8,fd00::1,host:8080,.example.com,https://other.example"
    hosts = f"fe80::/10,[::1],{kept},host:port,[fd00::1]:80,http://host:port,ü.example"
    environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": hosts, "no_proxy": hosts}
    end = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert end.stdout.strip() == f"{kept},127.0.0.1,localhost,::1", end.stderr


@pytest.mark.refused("proxy: SOCKS")
@pytest.mark.parametrize("name", ["ALL_PROXY", pytest.param("https_proxy", marks=pytest.mark.slow)])
def test_socks_proxy_is_reported_in_one_line(project, name):
    end = project.run("--source", "x", **{name: "socks5h://127.0.0.1:9"})
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith(f"ml_workflow.py: {name} ")


@pytest.mark.refused("proxy: its address is invalid")
@pytest.mark.parametrize(
    ("address", "usable"),
    [
        ("", True),
        ("http://127.0.0.1:9", True),
        ("127.0.0.1:9", True),
        ("https://ann:p@ss@proxy.example:9", True),
        ("http://proxy:port", False),  # httpx raises
        ("ftp://proxy", False),
        ("proxy:9", False),  # requests takes `proxy` for the scheme
        ("http://", False),
    ],
)
def test_unusable_proxy_is_detected(monkeypatch, address, usable):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", address)
    assert find_unusable_proxy() == (None if usable else "HTTPS_PROXY")


@pytest.mark.refused("disk: a folder whose name a database URL cannot contain")
def test_folder_that_a_database_url_cannot_name_is_reported(store):
    with pytest.raises(WorkflowError, match=r"\?.*ML_WORKFLOW_STATE"):
        connect_mlflow(NO_SERVER, store / "what?", "test")
    assert not (store / "what?").exists()


@pytest.mark.refused("disk: a folder whose name a database URL cannot contain, with an MLflow server only")
def test_folder_prefect_cannot_use_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # which would start the server, with its database elsewhere
    with (
        pytest.raises(WorkflowError, match=r"\?.*ML_WORKFLOW_STATE"),
        temporary_prefect_server(tmp_path / "what?/home"),
    ):
        pass
    assert not (tmp_path / "what?").exists()


@pytest.mark.parametrize("folder", ["plain", "with space", "$HOME `x`", "it's", 'a"b'])
def test_printed_command_quotes_any_folder_name(tmp_path, folder):
    command = shell_command("-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}", PREFECT_HOME=folder)
    shown = command.replace(f"{shlex.quote(sys.executable)} -m", "printf '%s|' \"$PREFECT_HOME\"").replace("=", "=", 1)
    end = subprocess.run(
        ["bash", "-c", f"export {shown.replace(' printf', '; printf', 1)}"], capture_output=True, text=True
    )
    assert end.stdout == f"{folder}|mlflow|server|--backend-store-uri|sqlite:///{folder}|", end.stderr
