"""Bad days: MLflow or Prefect dies, hangs or comes back, a database is locked. Nothing that was won is lost."""

import contextlib
import signal
import sqlite3
import time

from conftest import check_whole, prefect_states, runs_of, steps

import pytest

EPOCHS = 80
ARGUMENTS = ["--epochs", str(EPOCHS)]


def test_results_of_a_training_whose_mlflow_died_are_delivered_by_the_same_command(project, photos, prefect):
    with project.mlflow_server():
        run = project.start("--source", str(photos), *ARGUMENTS, **prefect)
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGKILL)
        run.end()
    assert run.returncode == 1
    assert f"epoch {EPOCHS} of {EPOCHS}" in run.output
    assert "Traceback" not in run.output
    assert "the same command goes on from there" in run.output
    assert run.output.splitlines()[-1].startswith(f"ml_workflow.py: MLflow at http://127.0.0.1:{project.mlflow_port}")
    with project.mlflow_server():
        end = project.run("--source", str(photos), *ARGUMENTS, **prefect)
    assert end.returncode == 0, end.stderr
    (only,) = runs_of(project)
    check_whole(project, only, EPOCHS)


@pytest.mark.slow
def test_training_misses_no_epoch_when_mlflow_is_started_again_meanwhile(project, photos, prefect):
    with project.mlflow_server():
        run = project.start("--source", str(photos), "--epochs", "300", **prefect)
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGKILL)
        run.read_until("epoch 60 of")
    with project.mlflow_server():
        run.end()
    assert run.returncode == 0, run.output
    assert "Traceback" not in run.output
    (only,) = runs_of(project)
    check_whole(project, only, 300)


@pytest.mark.slow
def test_mlflow_that_hangs_delays_the_run_by_a_bounded_time(project, photos, prefect):
    with project.mlflow_server():
        run = project.start("--source", str(photos), *ARGUMENTS, **prefect, MLFLOW_HTTP_REQUEST_TIMEOUT="3")
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGSTOP)
        assert run.end() < 60
        assert run.returncode == 1
        assert "Traceback" not in run.output
        run = project.start("--source", str(photos), *ARGUMENTS, "--seed", "1", **prefect)
        time.sleep(1)
        project.signal_server("mlflow", signal.SIGCONT)
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGSTOP)
        assert run.end(signal.SIGINT) < 10
        assert "\nml_workflow.py: stopped\n" in run.output
        assert "Traceback" not in run.output
        project.signal_server("mlflow", signal.SIGCONT)
        end = project.run("--source", str(photos), *ARGUMENTS, **prefect)
    assert end.returncode == 0, end.stderr
    whole, stopped = runs_of(project)
    assert stopped.info.status == "KILLED"
    assert whole.info.status == "FINISHED"
    assert steps(project, whole, "loss") == list(range(EPOCHS))


@pytest.mark.slow
def test_prefect_that_dies_or_hangs_in_training_fails_nothing(project, photos):
    with project.prefect_server():
        hurry = {"PREFECT_API_REQUEST_TIMEOUT": "2", "PREFECT_CLIENT_MAX_RETRIES": "1"}
        run = project.start("--source", str(photos), *ARGUMENTS, **hurry)
        run.read_until("epoch 30 of")
        project.signal_server("prefect", signal.SIGSTOP)
        assert run.end() < 90
    assert run.returncode == 0, run.output
    assert "Prefect does not answer" in run.output
    assert "Traceback" not in run.output
    with project.prefect_server():
        run = project.start("--source", str(photos), *ARGUMENTS, **hurry)
        run.read_until("epoch 30 of")
        project.signal_server("prefect", signal.SIGKILL)
        assert run.end() < 60
    assert run.returncode == 0, run.output
    assert "version 2 is not the champion" in run.output
    assert "Traceback" not in run.output
    for only in runs_of(project):
        check_whole(project, only, EPOCHS)


@pytest.mark.slow
def test_prefect_that_is_started_again_meanwhile_has_the_whole_history(project, photos):
    with project.prefect_server():
        run = project.start("--source", str(photos), "--epochs", "300")
        run.read_until("epoch 30 of")
        project.signal_server("prefect", signal.SIGKILL)
    with project.prefect_server() as url:
        run.end()
        assert run.returncode == 0, run.output
        assert prefect_states(url, "flow_runs") == ["Completed"]


@pytest.mark.slow
def test_databases_that_another_process_locks_for_a_while_are_waited_for(project, photos):
    assert project.run("--source", str(photos), "--epochs", "1").returncode == 0
    run = project.start("--source", str(photos), "--epochs", "200")
    run.read_until("epoch 2 of")
    for name in ("mlflow.db", "prefect_home/prefect.db"):
        with contextlib.closing(sqlite3.connect(project.folder / name, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(3)
            other.execute("COMMIT")
    run.end()
    assert run.returncode == 0, run.output
    check_whole(project, runs_of(project)[-1], 200)
