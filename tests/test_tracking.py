import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from conftest import PROJECT, SECONDS
from workflow.errors import WorkflowError
from workflow.running import runs, tracking

import mlflow
import pytest
import requests
from prefect.context import refresh_global_settings_context
from prefect.exceptions import TerminationSignal
from prefect.settings import get_current_settings
from prefect.utilities.engine import capture_sigterm


@pytest.fixture
def store(tmp_path, monkeypatch):
    """No MLflow server anywhere; the tracking database in an empty folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def prefect_settings(monkeypatch):
    """Prefect's settings, put back as they were."""
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setenv("PREFECT_UI_URL", "")
    yield
    monkeypatch.undo()
    refresh_global_settings_context()


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminationSignal)])
def test_signal_is_deferred_until_it_is_delivered_or_the_block_ends(number, stop):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has its programs ignore it

    def defer() -> None:
        with tracking.deferred_signals() as deliver:
            signal.raise_signal(number)
            with pytest.raises(stop):
                deliver()
            deliver()
            signal.raise_signal(number)
            passed.append(number)

    passed = []
    with capture_sigterm():
        handler = signal.getsignal(number)
        with pytest.raises(stop):
            defer()
        assert signal.getsignal(number) is handler
    assert passed == [number]


@pytest.mark.parametrize("wait", [lambda: signal.raise_signal(signal.SIGINT), lambda: time.sleep(SECONDS)])
def test_deferred_signal_is_delivered_at_once_by_a_second_one_or_by_time(wait, monkeypatch):
    def defer() -> None:
        with tracking.deferred_signals():
            signal.raise_signal(signal.SIGINT)
            begun.append(time.monotonic())
            wait()

    monkeypatch.setattr(tracking, "PENDING_SECONDS", 0.2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = []
    with pytest.raises(KeyboardInterrupt):
        defer()
    assert time.monotonic() - begun.pop() < SECONDS / 2


def test_signal_without_a_handler_is_not_deferred():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with tracking.deferred_signals():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_port_where_nothing_listens_is_free(unused_port):
    assert tracking.server_answers(f"http://127.0.0.1:{unused_port}/version", ".*", "") is False


def test_port_where_something_else_answers_is_told_with_the_remedy(store, image_server):
    with pytest.raises(WorkflowError, match=f"port {image_server.server_port} is taken by something else than MLflow"):
        tracking.connect_mlflow(image_server.url, store, "test")


def test_port_that_accepts_and_never_answers_is_told():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(WorkflowError, match="is taken by something else than Prefect"):
            tracking.server_answers(url, "true", "Prefect")


def test_prefect_follows_the_connection_although_it_is_imported_already(prefect_settings):
    tracking.use_prefect("http://127.0.0.1:1")
    assert get_current_settings().api.url == "http://127.0.0.1:1/api"
    assert get_current_settings().ui_url == tracking.PREFECT_URL


def test_telemetry_of_every_library_is_off():
    from mlflow.telemetry.utils import is_telemetry_disabled
    from prefect.analytics import is_telemetry_enabled

    assert not is_telemetry_enabled()
    assert is_telemetry_disabled()
    assert not get_current_settings().server.analytics_enabled


def test_server_of_a_killed_run_is_gone_with_it(tmp_path):
    program = "import sys, pathlib, time\nfrom workflow.running import tracking\nwith tracking.temporary_server(pathlib.Path(sys.argv[1])) as url:\n"
    command = [sys.executable, "-c", program + "    print(url, flush=True); time.sleep(600)", str(tmp_path / "home")]
    run = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    with run:
        url = run.stdout.readline().split()[-1]
        assert requests.get(f"{url}/api/health", timeout=5).text == "true"
        os.kill(run.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while tracking.server_answers(f"{url}/api/health", "true", "the run's own server"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_server_that_cannot_start_is_told_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "SERVER_PROGRAM", "raise SystemExit('no server today')")
    with (
        pytest.raises(WorkflowError, match=r"did not start: .*server.log says why"),
        tracking.temporary_server(tmp_path / "home"),
    ):
        pass
    assert "no server today" in (tmp_path / "home/server.log").read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_run_ends_with_the_status_of_its_block(store, error, status):
    assert "mlflow server" in tracking.connect_mlflow("http://127.0.0.1:1", store, "test")
    run_id = None
    try:
        with runs.mlflow_run(
            store / "models", "name", {"prefect_flow_run": "1", "command_digest": "c"}, "text", str
        ) as run:
            run_id = run.info.run_id
            if error:
                raise error
    except (ValueError, KeyboardInterrupt, SystemExit):
        pass
    assert mlflow.get_run(run_id).info.status == status
    assert mlflow.active_run() is None


def test_run_that_could_not_be_ended_stays_open_for_the_next_one_to_close(store, monkeypatch):
    tracking.connect_mlflow("http://127.0.0.1:1", store, "test")

    def gone(_):
        raise mlflow.exceptions.MlflowException("MLflow is away")

    opened = []

    def fail():
        tags = {"prefect_flow_run": "1", "command_digest": "c"}
        with runs.mlflow_run(store / "models", "name", tags, "text", str) as run:
            opened.append(run.info.run_id)
            monkeypatch.setattr(mlflow, "get_run", gone)
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    monkeypatch.undo()
    assert mlflow.active_run() is None  # else MLflow would call it FINISHED when the process ends
    assert mlflow.get_run(*opened).info.status == "RUNNING"
    tags = {"prefect_flow_run": "2", "command_digest": "d"}
    with runs.mlflow_run(store / "models", "name", tags, "text", str):
        assert mlflow.get_run(*opened).info.status == "KILLED"


def test_experiment_whose_artifacts_only_a_server_can_write_is_told(store):
    tracking.connect_mlflow("http://127.0.0.1:1", store, "other")
    mlflow.create_experiment("test", artifact_location="mlflow-artifacts:/7")
    with pytest.raises(WorkflowError, match="a server keeps the artifacts of test: start it with `mlflow server`"):
        tracking.connect_mlflow("http://127.0.0.1:1", store, "test")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 1), ("SIGTERM", -signal.SIGTERM)])
def test_signal_whose_exception_is_dropped_comes_again(name, status):
    program = (
        "import signal, time, tracking\n"
        "from prefect.utilities.engine import capture_sigterm\n"
        "class Dropping:\n"
        f"    def __del__(self): signal.raise_signal(signal.{name})\n"
        "with tracking.command_line('program'), capture_sigterm():\n"
        "    Dropping()\n"
        "    print('dropped', flush=True)\n"
        "    for _ in range(1000): time.sleep(0.01)\n"
    )
    end = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)
    assert (end.returncode, end.stdout) == (status, "dropped\n"), end.stderr
    assert "Traceback" not in end.stderr


def run_together(count: int, program: str, folder) -> None:
    """Runs a program that many times at once; each has to end well."""

    def run(_) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, str(folder)]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)

    with ThreadPoolExecutor(count) as pool:
        ends = list(pool.map(run, range(count)))
    assert [end.returncode for end in ends] == [0] * count, [end.stderr for end in ends]


def test_four_first_processes_share_one_sound_database(store):
    program = (
        "import sys, tracking, runs, mlflow, pathlib, uuid\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "tracking.connect_mlflow('http://127.0.0.1:1', folder, 'test')\n"
        "tags = {'prefect_flow_run': str(uuid.uuid4()), 'command_digest': 'c'}\n"
        "with runs.mlflow_run(folder / 'models', 'name', tags, '', str): mlflow.log_metric('loss', 1)\n"
    )
    run_together(4, program, store)
    client = mlflow.MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 4


def test_three_first_servers_share_one_home(tmp_path):
    program = "import sys, tracking, pathlib\nwith tracking.temporary_server(pathlib.Path(sys.argv[1])): pass\n"
    run_together(3, program, tmp_path / "home")


def test_proxy_is_never_asked_for_a_server_on_this_machine():
    program = "import workflow, requests; print(requests.utils.should_bypass_proxies('http://127.0.0.1:5000', None))"
    for name in ("NO_PROXY", "no_proxy"):
        environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", name: "intranet"}
        end = subprocess.run(
            [sys.executable, "-c", program], cwd=PROJECT, env=environment, capture_output=True, text=True
        )
        assert end.stdout.strip() == "True", end.stderr


def test_broken_database_is_told_in_one_line(store):
    (store / "mlflow.db").write_text("not a database at all, whatever its name says")
    with pytest.raises(WorkflowError, match=r"MLflow at sqlite:.*not a database"):
        tracking.connect_mlflow("http://127.0.0.1:1", store, "test")
