"""Faults of servers: MLflow or Prefect dies, hangs or restarts, a database is locked. No result is lost."""

import contextlib
import shutil
import signal
import sqlite3
import time

from support.project import check_whole, fill, prefect_states, runs_of, steps, weights

import numpy as np
import pytest

EPOCHS = 80
ARGUMENTS = ["--epochs", str(EPOCHS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("epoch 30 of", marks=pytest.mark.refused("MLflow: killed during training")),
        pytest.param("epoch 80 of", marks=pytest.mark.refused("MLflow: killed before the model is logged")),
    ],
)
def test_same_command_succeeds_after_mlflow_died(project, photos, prefect, moment):
    with project.mlflow_server():
        run = project.start("--source", str(photos), *ARGUMENTS, **prefect)
        run.read_until(moment)
        project.signal_server("mlflow", signal.SIGKILL)
        run.end()
    assert run.returncode == 1
    assert f"epoch {EPOCHS} of {EPOCHS}" in run.output
    assert f"http://127.0.0.1:{project.mlflow_port}" in run.output.splitlines()[-1]
    with project.mlflow_server():
        end = project.run("--source", str(photos), *ARGUMENTS, **prefect)
    assert end.returncode == 0, end.stderr
    lost, whole = runs_of(project)
    assert lost.info.status == "KILLED"
    check_whole(project, whole, EPOCHS)


@pytest.mark.slow
@pytest.mark.survived("MLflow: restarted during training")
def test_restarted_mlflow_has_every_epoch_or_the_run_fails(project, photos, prefect):
    with project.mlflow_server():
        run = project.start("--source", str(photos), "--epochs", "300", **prefect)
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGKILL)
        run.read_until("epoch 60 of")
    with project.mlflow_server():
        run.end()
        (first,) = runs_of(project)
        if run.returncode:  # the server took longer than the retries of a request
            assert "repeat the command" in run.output.splitlines()[-1]
            assert project.run("--source", str(photos), "--epochs", "300", **prefect).returncode == 0
            assert first.info.status == "FAILED"
    check_whole(project, runs_of(project)[-1], 300)


@pytest.mark.slow
@pytest.mark.refused("MLflow: hangs during training", "MLflow: hangs, and Ctrl-C")
def test_hanging_mlflow_delays_the_run_by_a_bounded_time(project, photos, prefect):
    with project.mlflow_server():
        run = project.start("--source", str(photos), *ARGUMENTS, **prefect, MLFLOW_HTTP_REQUEST_TIMEOUT="3")
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGSTOP)
        assert run.end() < 60
        assert run.returncode == 1
        run = project.start("--source", str(photos), "--epochs", "300", "--seed", "1", **prefect)
        time.sleep(1)
        project.signal_server("mlflow", signal.SIGCONT)
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGSTOP)
        time.sleep(1.5)  # until metrics are being sent
        assert run.end(signal.SIGINT) < 10
        assert "\nml_workflow.py: stopped\n" in run.output
        project.signal_server("mlflow", signal.SIGCONT)
        end = project.run("--source", str(photos), *ARGUMENTS, **prefect)
    assert end.returncode == 0, end.stderr
    hung, stopped, whole = runs_of(project)
    assert (hung.info.status, stopped.info.status) == ("KILLED", "KILLED")
    assert whole.info.status == "FINISHED"
    assert steps(project, whole, "loss") == list(range(EPOCHS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGSTOP, marks=pytest.mark.survived("Prefect: hangs during training")),
        pytest.param(signal.SIGKILL, marks=pytest.mark.survived("Prefect: killed during training")),
    ],
)
def test_run_succeeds_when_prefect_dies_or_hangs(project, photos, number):
    with project.prefect_server():
        timeouts = {"PREFECT_API_REQUEST_TIMEOUT": "2", "PREFECT_CLIENT_MAX_RETRIES": "1"}
        run = project.start("--source", str(photos), *ARGUMENTS, **timeouts)
        run.read_until("epoch 30 of")
        project.signal_server("prefect", number)
        assert run.end() < 180
    assert run.returncode == 0, run.output
    (only,) = runs_of(project)
    check_whole(project, only, EPOCHS)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("MLFLOW_TRACKING_URI", marks=pytest.mark.refused("MLflow: the configured server is down")),
        pytest.param(
            "PREFECT_API_URL",
            marks=[pytest.mark.slow, pytest.mark.refused("Prefect: the configured server is down")],
        ),
    ],
)
def test_configured_server_that_is_down_starts_nothing(project, photos, unused_port, setting):
    before = {path.name for path in project.folder.iterdir()} | {"__pycache__", "mlflow.db", ".mlflow.lock"}
    end = project.run("--source", str(photos), **{setting: f"http://127.0.0.1:{unused_port}"})
    assert end.returncode == 1
    assert setting in end.stderr
    assert end.stderr.count("\n") == 1
    assert {path.name for path in project.folder.iterdir()} <= before


@pytest.mark.slow
@pytest.mark.refused("Prefect: its server requires a password")
def test_server_with_a_password_is_reported_with_the_remedy(project, photos):
    password = {"PREFECT_SERVER_API_AUTH_STRING": "ann:hunter2"}
    with project.prefect_server(**password):
        end = project.run("--source", str(photos), "--epochs", "2")
        assert end.returncode == 1
        assert "PREFECT_API_AUTH_STRING" in end.stderr.splitlines()[-1]
        end = project.run("--source", str(photos), "--epochs", "2", PREFECT_API_AUTH_STRING="ann:hunter2")
        assert end.returncode == 0, end.stderr


@pytest.mark.slow
@pytest.mark.refused("MLflow: its disk is full during training")
def test_run_finishes_once_mlflow_has_disk_space_again(project, photos, small_disk, prefect):
    with project.mlflow_server("--backend-store-uri", f"sqlite:///{small_disk / 'mlflow.db'}"):
        run = project.start("--source", str(photos), *ARGUMENTS, **prefect)
        run.read_until("epoch 30 of")
        fill(small_disk)
        run.end()
        assert run.returncode == 1
        assert f"epoch {EPOCHS} of {EPOCHS}" in run.output
        (small_disk / "filler").unlink()
        end = project.run("--source", str(photos), *ARGUMENTS, **prefect)
        assert end.returncode == 0, end.stderr
    shutil.copy(small_disk / "mlflow.db", project.folder)
    lost, whole = runs_of(project)
    assert lost.info.status in ("FAILED", "KILLED")
    check_whole(project, whole, EPOCHS)


@pytest.mark.slow
@pytest.mark.survived("Prefect: its disk is full during training")
def test_run_succeeds_when_prefect_has_a_full_disk(project, photos, small_disk):
    with project.prefect_server(small_disk):
        run = project.start("--source", str(photos), *ARGUMENTS)
        run.read_until("epoch 30 of")
        fill(small_disk)
        run.end()
        (small_disk / "filler").unlink()
    assert run.returncode == 0, run.output
    (only,) = runs_of(project)
    check_whole(project, only, EPOCHS)


@pytest.mark.slow
@pytest.mark.survived("Prefect: restarted during training")
def test_restarted_prefect_has_the_whole_history(project, photos):
    with project.prefect_server():
        run = project.start("--source", str(photos), "--epochs", "300")
        run.read_until("epoch 30 of")
        project.signal_server("prefect", signal.SIGKILL)
    with project.prefect_server() as url:
        run.end()
        assert run.returncode == 0, run.output
        assert prefect_states(url, "flow_runs") == ["Completed"]


@pytest.mark.slow
@pytest.mark.survived("MLflow: its database is locked for 3 s", "Prefect: its database is locked for 3 s")
def test_run_waits_for_locked_databases(project, photos):
    assert project.run("--source", str(photos), "--epochs", "1").returncode == 0
    run = project.start("--source", str(photos), "--epochs", "200")
    run.read_until("epoch 2 of")
    for name in ("mlflow.db", "prefect_home/prefect.db"):
        with contextlib.closing(sqlite3.connect(project.folder / name, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            time.sleep(3)
            database.execute("COMMIT")
    run.end()
    assert run.returncode == 0, run.output
    check_whole(project, runs_of(project)[-1], 200)


@pytest.mark.slow
@pytest.mark.survived("MLflow: restarted at ten random moments")
def test_mlflow_restarted_at_any_moment_has_whole_runs(project, photos, prefect):
    arguments = ["--source", str(photos), "--epochs", "60"]
    with project.mlflow_server():
        start = time.monotonic()
        assert project.run(*arguments, **prefect).returncode == 0
        seconds = time.monotonic() - start
    for moment in np.random.default_rng(5).uniform(0.1, 1, 10):
        with project.mlflow_server():
            run = project.start(*arguments, **prefect)
            time.sleep(seconds * moment)
            project.signal_server("mlflow", signal.SIGKILL)
        with project.mlflow_server():
            run.end()
            if run.returncode:
                assert "repeat the command" in run.output.splitlines()[-1]
                assert project.run(*arguments, **prefect).returncode == 0
    runs = [run for run in runs_of(project) if run.info.status == "FINISHED"]
    assert len(runs) == 11
    for run in runs:
        check_whole(project, run, 60)
        assert run.data.metrics.keys() == runs[0].data.metrics.keys()
        assert weights(project, run) == weights(project, runs[0])
