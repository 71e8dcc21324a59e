"""--clean: what nobody needs goes, what a version or an unfinished run needs stays."""

import subprocess

from support.project import Project, runs_of
from workflow.orchestration.cleaning import is_over

import mlflow
import pytest
from filelock import FileLock
from mlflow.entities import Run, RunData, RunInfo


def models_of(project: Project) -> list[str]:
    return sorted(path.parent.parent.name for path in project.folder.glob("mlartifacts/models/*/artifacts/MLmodel"))


@pytest.mark.slow
def test_clean_removes_what_no_version_and_no_unfinished_run_needs(project, photos, prefect):
    for epochs in ("1", "2"):
        assert project.run("--source", str(photos), "--epochs", epochs, **prefect).returncode == 0
    client = mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    refused, _ = runs_of(project)
    client.delete_model_version("apples-oranges", "1")
    client.delete_run(refused.info.run_id)
    assert len(models_of(project)) == 2
    (project.folder / "models/not-of-a-run").mkdir()
    end = project.run("--clean")
    assert end.returncode == 0, end.stderr
    told, rest = end.stdout.splitlines()
    assert told.startswith("Removed 2 folder(s) of finished runs in ")
    assert "1 model(s) without a registered version, and 1 run(s) that you have deleted in MLflow: " in told
    assert float(told.rpartition(": ")[2].split()[0]) > 13
    assert rest.startswith("1 registered version(s) stay, ")
    assert [path.name for path in (project.folder / "models").glob("[!.]*")] == ["not-of-a-run"]
    assert len(models_of(project)) == 1
    end = project.run(str(photos / "apples"), "--model", "models:/apples-oranges/2", script="predict.py")
    assert end.returncode == 0, end.stderr
    assert project.run("--clean").stdout.splitlines()[0] == "There is nothing to remove."


@pytest.mark.parametrize(
    ("status", "store", "here", "over"),
    [
        ("FINISHED", "http://elsewhere", False, True),
        ("FAILED", "http://elsewhere", True, True),
        ("FAILED", "http://elsewhere", False, False),
        ("FAILED", "sqlite:///own.db", False, True),
        ("RUNNING", "sqlite:///own.db", True, False),
    ],
)
def test_failed_run_of_another_folder_is_left_alone(tmp_path, monkeypatch, status, store, here, over):
    info = RunInfo("1", "0", "me", status, 0, 1, "active")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: store)
    if here:
        (tmp_path / "1").mkdir()
    assert is_over(Run(info, RunData()), tmp_path) is over


@pytest.mark.parametrize("answer", ["n\n", "\x04"])  # the second is Ctrl-D
def test_clean_asks_a_person_and_leaves_everything_at_a_no(trained, answer):
    before = models_of(trained)
    command = ["script", "-qec", " ".join(trained.command("--clean")), "/dev/null"]
    asked = subprocess.Popen(
        command, cwd=trained.folder, env=trained.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    told = ""
    with asked:
        try:
            while "? Registered models stay. [y/N]" not in told:
                told += (letter := asked.stdout.read(1))
                assert letter, told
            with FileLock(trained.folder / "models/.scan.lock", blocking=False):
                pass  # a run that begins meanwhile need not wait for the person
            rest, _ = asked.communicate(answer, timeout=60)
        finally:
            asked.kill()
    assert "nothing was removed" in rest
    assert "Traceback" not in rest
    assert asked.returncode == 1
    assert models_of(trained) == before
    assert list(trained.folder.glob("models/*/model.keras"))
