"""Bad days: processes are killed or run together, disks are full. Nothing that was won is lost."""

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
def test_process_killed_in_any_task_loses_no_training(project, photos):
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
        (whole,) = runs_of(project)
        check_whole(project, whole, EPOCHS)
        assert sorted(prefect_states(prefect_url, "flow_runs")) == ["Completed"] + ["Crashed"] * 5
        assert "Running" not in prefect_states(prefect_url, "task_runs")
        undisturbed = project.run("--source", images.url, *ARGUMENTS)
        assert undisturbed.returncode == 0
        again = runs_of(project)[-1]
        assert again.info.run_id != whole.info.run_id
        assert weights(project, again) == weights(project, whole)
        assert again.data.params == whole.data.params


@pytest.mark.slow
@pytest.mark.survived("process: kill -9, then the run deleted", "process: kill -9, then the backup damaged")
def test_deleted_run_and_damaged_backup_stop_no_later_run(project, photos, prefect):
    arguments = ["--source", str(photos), *ARGUMENTS]

    def die() -> None:
        run = project.start(*arguments, **prefect)
        run.read_until("epoch 60 of")
        run.end(signal.SIGKILL)

    die()
    (deleted,) = runs_of(project)
    mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}").delete_run(deleted.info.run_id)
    die()
    (died,) = runs_of(project)
    (project.folder / "models" / died.info.run_id / "training.npz").write_bytes(b"")
    end = project.run(*arguments, **prefect)
    assert end.returncode == 0, end.stderr
    died, whole = runs_of(project)  # epochs that are in MLflow already are not trained again in the same run
    assert died.info.status == "KILLED"
    check_whole(project, whole, EPOCHS)


@pytest.mark.slow
@pytest.mark.survived("process: kill -9 without internet, which is back for the next run")
def test_resumed_run_keeps_its_sample_images(project, photos, prefect, unused_port):
    source = f"http://127.0.0.1:{unused_port}/img-lab"
    project.lab_url = source
    run = project.start("--epochs", "40", **prefect)
    run.read_until("epoch 20 of")
    run.end(signal.SIGKILL)
    with closing_server(ImageServer(photos, unused_port)):
        for told in ("Images: sample_images, because 127.0.0.1", f"Images: {source}"):
            end = project.run("--epochs", "40", **prefect)
            assert end.returncode == 0, end.stderr
            assert told in end.stdout
    gone_on, other = runs_of(project)
    check_whole(project, gone_on, 40)
    check_whole(project, other, 40)


@pytest.mark.slow
@pytest.mark.survived("process: Ctrl-C", "process: SIGTERM", "process: another run that lives")
def test_signals_end_the_run_and_the_same_command_resumes(project, photos):
    with project.prefect_server() as prefect_url, project.mlflow_server():
        for number, moment in ((signal.SIGINT, "epoch 20 of"), (signal.SIGTERM, "epoch 40 of")):
            run = project.start("--source", str(photos), *ARGUMENTS)
            run.read_until(moment)
            assert run.end(number) < 10
            assert run.returncode != 0
            assert "the same command goes on from there" in run.output
            assert [one.info.status for one in runs_of(project)] == ["KILLED"]
            assert set(prefect_states(prefect_url, "flow_runs")) == {"Cancelled"}
        other = project.start("--source", str(photos), "--epochs", "1")  # lives, and is another command
        end = project.run("--source", str(photos), *ARGUMENTS)
        other.end()
    assert (end.returncode, other.returncode) == (0, 0)
    assert re.search(r"going on after epoch [4-7]\d of 80", end.stdout + end.stderr)
    first, second = sorted(runs_of(project), key=lambda one: -int(one.data.params["epochs"]))
    check_whole(project, first, EPOCHS)
    check_whole(project, second, 1)


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
IN_EVALUATION = """
ml_workflow.registry.evaluate_candidate = lambda *_: interrupt_in_an_import()
ml_workflow.main()
"""


@pytest.mark.slow
@pytest.mark.survived("process: Ctrl-C in the middle of an import that MLflow tries, in training and later")
def test_interrupt_never_leaves_a_run_waiting_for_a_lock(project, photos, prefect):
    ends = []
    for moment in (IN_TRAINING, IN_EVALUATION):
        program = [sys.executable, "-c", IN_AN_IMPORT + moment]
        ends.append(project.execute([*program, "--source", str(photos), "--epochs", "3"], **prefect))
    assert [end.returncode for end in ends] == [1, 1], ends
    assert "the same command goes on from there" in ends[0].stdout
    assert "closes this one" not in ends[0].stdout
    assert "ml_workflow.py: stopped" in ends[0].stderr
    assert "going on after epoch 1 of 3" in ends[1].stdout + ends[1].stderr
    assert "The next run closes this one in MLflow: it does not answer" in ends[1].stdout
    assert "ml_workflow.py: stopped" in ends[1].stderr
    end = project.run("--source", str(photos), "--epochs", "3", **prefect)
    assert end.returncode == 0, end.stderr
    (whole,) = runs_of(project)
    check_whole(project, whole, 3)


@pytest.mark.slow
@pytest.mark.refused("process: Ctrl-C while hosts do not answer")
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
def test_four_first_runs_at_once_get_the_numbers_of_one_alone(project, photos, served):
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
    for one in runs:
        check_whole(project, one, 40)
    assert len({weights(project, one) for one in runs}) == 1
    assert len({one.data.metrics["test_loss"] for one in runs}) == 1
    assert sum(" was promoted to champion " in one.data.tags["gate"] for one in runs) == 1
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
def test_disk_that_takes_nothing_is_told_and_harms_no_file(project, photos, small_disk, prefect, fault, place):
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
    with Image.open(changed / "apples/apple-10.jpeg") as photo:  # a photo that is new has to be written down
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
def test_full_disk_with_the_databases_on_it_is_told(photos, small_disk):
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
def test_run_killed_at_any_moment_ends_as_an_undisturbed_one(project, photos, prefect):
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
        if len(runs_of(project)) == before or runs_of(project)[-1].info.status != "FINISHED":  # else it was too late
            killed += 1
            end = project.run(*arguments, **prefect)
            assert end.returncode == 0, end.stderr
        assert len(runs_of(project)) == before + 1
        whole = runs_of(project)[-1]
        check_whole(project, whole, 30)
        assert weights(project, whole) == weights(project, undisturbed)
        assert whole.data.metrics["test_loss"] == undisturbed.data.metrics["test_loss"]
        assert whole.data.params == undisturbed.data.params
