"""Processes that are killed or run at the same time, and full disks: nothing is lost or left half-done."""

import contextlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from support.images import ImageServer, closing_server
from support.project import Project, check_whole, fill, prefect_states, runs_of, weights

import mlflow
import numpy as np
import pytest
from PIL import Image

EPOCHS = 80
ARGUMENTS = ["--epochs", str(EPOCHS)]
TASKS = ("download_data", "preprocess_data", "train_model", "evaluate_model", "register_model")


@pytest.mark.slow
@pytest.mark.survived(*[f"process: kill -9 in {task}" for task in TASKS])
def test_killed_run_is_closed_and_the_next_one_is_undisturbed(project, photos):
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
        *dead, first = runs_of(project)
        assert [run.info.status for run in dead] == ["KILLED"] * 5
        check_whole(project, first, EPOCHS)
        assert sorted(prefect_states(prefect_url, "flow_runs")) == ["Completed"] + ["Crashed"] * 5
        assert "Running" not in prefect_states(prefect_url, "task_runs")
        assert project.run("--source", images.url, *ARGUMENTS).returncode == 0
        second = runs_of(project)[-1]
        assert weights(project, second) == weights(project, first)
        assert second.data.params == first.data.params


@pytest.mark.slow
@pytest.mark.survived("process: kill -9, then the run deleted")
def test_deleted_dead_run_stops_no_later_run(project, photos, prefect):
    arguments = ["--source", str(photos), *ARGUMENTS]
    run = project.start(*arguments, **prefect)
    run.read_until("epoch 60 of")
    run.end(signal.SIGKILL)
    (deleted,) = runs_of(project)
    mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}").delete_run(deleted.info.run_id)
    end = project.run(*arguments, **prefect)
    assert end.returncode == 0, end.stderr
    check_whole(project, *runs_of(project), EPOCHS)


@pytest.mark.slow
@pytest.mark.survived("process: Ctrl-C", "process: SIGTERM", "process: another run that is alive")
def test_signals_end_the_run_and_another_one_is_left_alone(project, photos):
    with project.prefect_server() as prefect_url, project.mlflow_server():
        for number, moment in ((signal.SIGINT, "epoch 20 of"), (signal.SIGTERM, "epoch 40 of")):
            run = project.start("--source", str(photos), *ARGUMENTS)
            run.read_until(moment)
            assert run.end(number) < 10
            assert run.returncode != 0
        assert [run.info.status for run in runs_of(project)] == ["KILLED"] * 2
        assert set(prefect_states(prefect_url, "flow_runs")) == {"Cancelled"}
        other = project.start("--source", str(photos), "--epochs", "1")
        end = project.run("--source", str(photos), *ARGUMENTS)
        other.end()
    assert (end.returncode, other.returncode) == (0, 0)
    for run in runs_of(project)[2:]:
        check_whole(project, run, int(run.data.params["epochs"]))


IN_AN_IMPORT = """
import _imp
import signal
import ml_workflow
from mlflow.utils.async_logging import async_logging_queue

signal.signal(signal.SIGINT, signal.default_int_handler)
once = iter([signal.SIGINT])

def interrupt_in_an_import():
    _imp.acquire_lock()
    for number in once:
        signal.raise_signal(number)
    _imp.release_lock()
"""
IN_TRAINING = """
class Queue(async_logging_queue.Queue):
    def put(self, metrics):
        interrupt_in_an_import()
        super().put(metrics)

async_logging_queue.Queue = Queue
ml_workflow.main()
"""


@pytest.mark.slow
@pytest.mark.survived("process: Ctrl-C in the middle of an import that MLflow attempts while it trains")
def test_interrupt_in_an_import_leaves_no_run_waiting(project, photos, prefect):
    command = [sys.executable, "-c", IN_AN_IMPORT + IN_TRAINING, "--source", str(photos), "--epochs", "3"]
    end = project.execute(command, **prefect)
    assert end.returncode == 1
    assert "ml_workflow.py: stopped" in end.stderr
    assert [run.info.status for run in runs_of(project)] == ["KILLED"]
    assert project.run("--source", str(photos), "--epochs", "3", **prefect).returncode == 0
    check_whole(project, runs_of(project)[-1], 3)


@pytest.mark.slow
@pytest.mark.refused("process: Ctrl-C while hosts do not respond")
def test_interrupted_download_waits_for_no_host(project, photos, prefect):
    with closing_server(ImageServer(photos)) as images:
        images.faults = {name: ["stall"] for name in ("apples/apple-2.jpeg", "apples/apple-3.jpeg")}
        run = project.start("--source", images.url, **prefect)
        run.read_until("Beginning flow run")
        while len(images.requests) < 6:
            time.sleep(0.1)
        assert run.end(signal.SIGINT) < 10
    assert "\nml_workflow.py: stopped\n" in run.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "served",
    [
        pytest.param(False, marks=pytest.mark.survived("process: four first runs at once, without servers")),
        pytest.param(True, marks=pytest.mark.survived("process: four first runs at once, with servers")),
    ],
)
def test_four_first_runs_at_once_get_the_numbers_of_one_alone(tmp_path, photos, served):
    project = Project(tmp_path)
    with contextlib.ExitStack() as servers, closing_server(ImageServer(photos)) as images:
        if served:
            servers.enter_context(project.prefect_server())
            servers.enter_context(project.mlflow_server())
        arguments = ["--source", images.url, "--epochs", "40"]
        with ThreadPoolExecutor(4) as pool:
            ends = list(pool.map(lambda _: project.run(*arguments), range(4)))
        assert [end.returncode for end in ends] == [0] * 4, "\n".join(end.stderr for end in ends)
        assert project.run(*arguments).returncode == 0  # alone
    runs = runs_of(project)
    for run in runs:
        check_whole(project, run, 40)
    assert len({weights(project, run) for run in runs}) == 1
    assert len({run.data.metrics["test_loss"] for run in runs}) == 1
    assert sum(" was promoted to champion " in run.data.tags["gate"] for run in runs) == 1
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    versions = client.search_model_versions("name = 'apples-oranges'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3, 4, 5]
    for name in ("mlflow.db", "prefect_home/prefect.db"):
        with sqlite3.connect(project.folder / name) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "place"),
    [
        pytest.param("full", "dataset", marks=pytest.mark.refused("disk: full while preprocessing")),
        pytest.param("full", "models", marks=pytest.mark.refused("disk: full while training")),
        pytest.param("read-only", "dataset", marks=pytest.mark.refused("disk: read-only dataset")),
        pytest.param("read-only", "models", marks=pytest.mark.refused("disk: read-only models")),
    ],
)
def test_full_or_read_only_disk_is_reported_and_harms_no_file(project, photos, small_disk, prefect, fault, place):
    assert project.run("--source", str(photos), "--epochs", "1", **prefect).returncode == 0
    old = project.folder / place
    shutil.copytree(old, small_disk, dirs_exist_ok=True)
    shutil.rmtree(old)
    old.symlink_to(small_disk)
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    if fault == "full":
        fill(small_disk)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    changed = project.folder / "changed"
    shutil.copytree(photos, changed)
    with Image.open(changed / "apples/apple-10.jpeg") as photo:  # a new photo must be written to the cache
        photo.rotate(90).save(changed / "apples/apple-10.jpeg", "PNG")
    end = project.run("--source", str(changed), "--epochs", "2", **prefect)
    assert end.returncode == 1
    reason = "No space left on device" if fault == "full" else "Read-only file system"
    assert re.search(rf"^ml_workflow.py: .*{reason}", end.stderr, re.MULTILINE), end.stderr
    assert {path: path.read_bytes() for path in before} == before
    if fault == "full":
        (small_disk / "filler").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert project.run("--source", str(changed), "--epochs", "2", **prefect).returncode == 0


@pytest.mark.slow
@pytest.mark.refused("disk: full while training, with both databases on it")
def test_full_disk_with_the_databases_on_it_is_reported(photos, small_disk):
    project = Project(small_disk / "project")
    arguments = ["--source", str(photos), "--epochs", "80"]
    run = project.start(*arguments)
    run.read_until("epoch 30 of")
    fill(small_disk)
    run.end()
    assert run.returncode == 1
    last = run.output.splitlines()[-1]
    assert re.search("ml_workflow.py: .*(No space left on device|disk is full)", last), run.output
    assert "Query-invoked autoflush" not in run.output
    (small_disk / "filler").unlink()
    end = project.run(*arguments)
    assert end.returncode == 0, end.stderr
    check_whole(project, runs_of(project)[-1], 80)


@pytest.mark.slow
@pytest.mark.survived("process: kill -9 at ten random moments")
def test_run_killed_at_any_moment_is_closed_and_repeatable(project, photos, prefect):
    arguments = ["--source", str(photos), "--epochs", "30"]
    start = time.monotonic()
    assert project.run(*arguments, **prefect).returncode == 0
    seconds = time.monotonic() - start
    (undisturbed,) = runs_of(project)
    random, killed = np.random.default_rng(4), 0
    while killed < 10:
        before = len(runs_of(project))
        run = project.start(*arguments, **prefect)
        time.sleep(seconds * random.uniform(0.05, 0.95))
        run.end(signal.SIGKILL)
        runs = runs_of(project)[before:]
        if runs and runs[0].info.status == "FINISHED":  # killed too late
            continue
        killed += 1
        end = project.run(*arguments, **prefect)
        assert end.returncode == 0, end.stderr
        *dead, whole = runs_of(project)[before:]
        assert [run.info.status for run in dead] == ["KILLED"] * len(runs)
        check_whole(project, whole, 30)
        assert weights(project, whole) == weights(project, undisturbed)
        assert whole.data.metrics["test_loss"] == undisturbed.data.metrics["test_loss"]
        assert whole.data.params == undisturbed.data.params
