"""Bad days: servers that die or hang, processes that are killed, disks that are full. Nothing that was won is lost."""

import contextlib
import hashlib
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from conftest import Copy, ImageServer, closing_server

import mlflow
import pytest
import requests

EPOCHS = 80
ARGUMENTS = ["--epochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory):
    """A Prefect server for all that do not test Prefect: its address, as a setting."""
    with Copy(tmp_path_factory.mktemp("prefect")).prefect_server() as url:
        yield {"PREFECT_API_URL": url}


def runs_of(project: Copy) -> list:
    """All MLflow runs of the project, the oldest first."""
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ml-workflow")
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"]))


def steps(project: Copy, run, metric: str) -> list[int]:
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    return sorted(entry.step for entry in client.get_metric_history(run.info.run_id, metric))


def check_whole(project: Copy, run, epochs: int = EPOCHS) -> None:
    """The run is finished, has each epoch once, and a registered version."""
    assert run.info.status == "FINISHED"
    for metric in ("loss", "val_accuracy"):
        assert steps(project, run, metric) == list(range(epochs))
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    assert len(client.search_model_versions(f"run_id = '{run.info.run_id}'")) == 1
    folder = project.folder / "models" / run.info.run_id
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("training-", ".part"))]
    assert not list((project.folder / "models/.unfinished").iterdir())


def weights(project: Copy, run) -> str:
    path = project.folder / "models" / run.info.run_id / "model.weights.h5"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prefect_states(url: str, kind: str) -> list[str]:
    runs = requests.post(f"{url}/{kind}/filter", json={"sort": "EXPECTED_START_TIME_ASC"}, timeout=30).json()
    return [run["state_name"] for run in runs]


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
    check_whole(project, only)


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


def test_mlflow_that_hangs_delays_the_run_by_a_bounded_time(project, photos, prefect):
    with project.mlflow_server():
        run = project.start("--source", str(photos), *ARGUMENTS, **prefect, MLFLOW_HTTP_REQUEST_TIMEOUT="3")
        run.read_until("epoch 30 of")
        project.signal_server("mlflow", signal.SIGSTOP)
        assert run.end() < 60
        assert run.returncode == 1
        assert "Traceback" not in run.output
        project.signal_server("mlflow", signal.SIGCONT)
        end = project.run("--source", str(photos), *ARGUMENTS, **prefect)
    assert end.returncode == 0, end.stderr
    (only,) = runs_of(project)
    check_whole(project, only)


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
        check_whole(project, only)


def test_prefect_that_is_started_again_meanwhile_has_the_whole_history(project, photos):
    with project.prefect_server():
        run = project.start("--source", str(photos), "--epochs", "300")
        run.read_until("epoch 30 of")
        project.signal_server("prefect", signal.SIGKILL)
    with project.prefect_server() as url:
        run.end()
        assert run.returncode == 0, run.output
        assert prefect_states(url, "flow_runs") == ["Completed"]


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


def test_process_that_is_killed_in_any_task_leaves_no_open_run_and_loses_no_training(project, photos):
    with project.prefect_server() as prefect_url, closing_server(ImageServer(photos)) as images:
        images.faults["apples/apple-1.jpeg"] = ["stall"]
        run = project.start("--source", images.url, *ARGUMENTS)
        while not images.requests:
            time.sleep(0.1)
        run.end(signal.SIGKILL)
        for moment in (
            "download_data.* Finished",
            "epoch 20 of",
            "train_model.* Finished",
            "evaluate_model.* Finished",
        ):
            run = project.start("--source", images.url, *ARGUMENTS)
            run.read_until(moment)
            run.end(signal.SIGKILL)
        end = project.run("--source", images.url, *ARGUMENTS)
        assert end.returncode == 0, end.stderr
        *died, whole = runs_of(project)
        assert {one.info.status for one in died} <= {"KILLED"}
        assert len(died) <= 2  # before the training began
        check_whole(project, whole)
        assert sorted(prefect_states(prefect_url, "flow_runs")) == ["Completed"] + ["Crashed"] * 5
        assert "Running" not in prefect_states(prefect_url, "task_runs")
        undisturbed = project.run("--source", images.url, *ARGUMENTS)
        assert undisturbed.returncode == 0
        again = runs_of(project)[-1]
        assert again.info.run_id != whole.info.run_id
        assert weights(project, again) == weights(project, whole)
        assert again.data.params == whole.data.params


def test_signals_end_the_run_at_once_and_the_same_command_goes_on(project, photos):
    with project.prefect_server() as prefect_url, project.mlflow_server():
        for number, moment in ((signal.SIGINT, "epoch 20 of"), (signal.SIGTERM, "epoch 40 of")):
            run = project.start("--source", str(photos), *ARGUMENTS)
            run.read_until(moment)
            assert run.end(number) < 10
            assert run.returncode != 0
            assert "Traceback" not in run.output
            assert "the same command goes on from there" in run.output
            assert [one.info.status for one in runs_of(project)] == ["KILLED"]
            assert set(prefect_states(prefect_url, "flow_runs")) == {"Cancelled"}
        other = project.start("--source", str(photos), "--epochs", "1")  # lives, and is another command
        end = project.run("--source", str(photos), *ARGUMENTS)
        other.end()
    assert (end.returncode, other.returncode) == (0, 0)
    assert "going on after epoch 4" in end.stdout + end.stderr
    first, second = sorted(runs_of(project), key=lambda one: -int(one.data.params["epochs"]))
    check_whole(project, first)
    check_whole(project, second, 1)


def test_interrupted_download_waits_for_no_host(project, photos, prefect):
    with closing_server(ImageServer(photos)) as images:
        images.faults = {name: ["stall"] for name in ("apples/apple-2.jpeg", "apples/apple-3.jpeg")}
        run = project.start("--source", images.url, **prefect)
        run.read_until("Beginning flow run")
        while len(images.requests) < 6:
            time.sleep(0.1)
        assert run.end(signal.SIGINT) < 4
    assert "\nml_workflow.py: stopped\n" in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("served", [False, True])
def test_four_first_runs_at_once_all_succeed_with_the_numbers_they_get_alone(project, photos, served):
    with contextlib.ExitStack() as servers, closing_server(ImageServer(photos)) as images:
        if served:
            servers.enter_context(project.prefect_server())
            servers.enter_context(project.mlflow_server())
        arguments = ["--source", images.url, "--epochs", "5"]
        with ThreadPoolExecutor(4) as pool:
            ends = list(pool.map(lambda _: project.run(*arguments), range(4)))
        assert [end.returncode for end in ends] == [0] * 4, "\n".join(end.stderr for end in ends)
        assert project.run(*arguments).returncode == 0
    runs = runs_of(project)
    for one in runs:
        check_whole(project, one, 5)
    assert len({weights(project, one) for one in runs}) == 1
    assert len({one.data.metrics["test_loss"] for one in runs}) == 1
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    versions = client.search_model_versions("name = 'apples-oranges'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3, 4, 5]
    for name in ("mlflow.db", "prefect_home/prefect.db"):
        with sqlite3.connect(project.folder / name) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 6 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("place", ["dataset", "models"])
def test_full_disk_is_told_in_one_line_and_what_was_there_stays_whole(project, photos, small_disk, prefect, place):
    assert project.run("--source", str(photos), "--epochs", "1", **prefect).returncode == 0
    old = project.folder / place
    shutil.copytree(old, small_disk, dirs_exist_ok=True)
    shutil.rmtree(old)
    old.symlink_to(small_disk)
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    changed = project.folder / "changed"
    shutil.copytree(photos, changed)
    (changed / "apples/apple-10.jpeg").unlink()
    end = project.run("--source", str(changed), "--epochs", "2", **prefect)
    assert end.returncode == 1
    assert "Traceback" not in end.stdout + end.stderr, end.stderr
    assert re.search(r"^ml_workflow.py: .*No space left on device", end.stderr, re.MULTILINE), end.stderr
    assert {path: path.read_bytes() for path in before} == before
    (small_disk / "filler").unlink()
    assert project.run("--source", str(changed), "--epochs", "2", **prefect).returncode == 0
