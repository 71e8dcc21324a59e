"""What nobody needs any more is found, told and removed: `python ml_workflow.py --clean`.

Folders of finished runs in `models/` go, because MLflow has what is in them; and so do, by `mlflow gc`, the models that
were logged and never registered, and the runs and versions that the user has deleted in MLflow. What a registered
version or an unfinished run needs stays.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from workflow.errors import WorkflowError, explain_os_errors
from workflow.running.mlflow_connection import database, keeps_runs_in
from workflow.running.mlflow_store import explain_store_errors
from workflow.running.recovery import UNFINISHED

import mlflow
from filelock import FileLock
from mlflow.entities import Run, ViewType

ENDED = ("FINISHED", "FAILED", "KILLED")


def clean(models: Path, state: Path, experiment: str) -> None:
    """Removes from `models` and from MLflow what nobody needs, after a person who sits there has said yes."""
    with explain_store_errors("repeat the command"), explain_os_errors(models):
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / ".scan.lock"):  # no run begins meanwhile
            before = disk_use([models, state / "mlartifacts"])
            runs = list_runs(experiment)
            ended = {run.info.run_id for run in runs if is_over(run, models)}
            deleted = sum(run.info.lifecycle_stage != "active" for run in runs)
            folders = [path for path in sorted(models.iterdir()) if path.name in ended]
            versions = mlflow.search_model_versions()
            registered = {version.model_id or (version.source or "").rpartition("/")[2] for version in versions}
            unused = [model for model in list_logged_models(experiment, ended) if model not in registered]
            told = f"{len(folders)} folder(s) of finished runs in {models}, {len(unused)} model(s) without a registered"
            told += f" version, and {deleted} run(s) that you have deleted in MLflow"
            if not (folders or unused or deleted):
                print("There is nothing to remove.")
            elif sys.stdin.isatty() and input(f"Remove {told}? [y/N] ").strip().lower() not in ("y", "yes"):
                raise WorkflowError("nothing was removed")
            else:
                for folder in folders:
                    shutil.rmtree(folder)
                for model_id in unused:
                    mlflow.MlflowClient().delete_logged_model(model_id)
                collect_garbage(state)
                freed = (before - disk_use([models, state / "mlartifacts"])) / 1e6
                print(f"Removed {told}: {freed:.1f} MB.")
            kept = disk_use([models, state / "mlartifacts"]) / 1e6
            print(
                f"{len(versions)} registered version(s) stay, {kept:.0f} MB on this disk. Delete in MLflow the runs "
                "and versions that you do not need, and repeat the command."
            )


def list_runs(experiment: str) -> list[Run]:
    """All runs of the experiment, with those that the user has deleted."""
    if (found := mlflow.get_experiment_by_name(experiment)) is None:
        return []
    return mlflow.search_runs([found.experiment_id], run_view_type=ViewType.ALL, output_format="list")


def is_over(run: Run, models: Path) -> bool:
    """Whether a run has ended and no command can go on with it."""
    lock = models / UNFINISHED / f"{run.data.tags.get('prefect_flow_run', '')}.lock"
    return run.info.status in ENDED and not lock.exists()


def list_logged_models(experiment: str, ended: set[str]) -> list[str]:
    """The ids of the models that runs which are over have logged."""
    if (found := mlflow.get_experiment_by_name(experiment)) is None:
        return []
    logged = mlflow.search_logged_models([found.experiment_id], output_format="list")
    return [model.model_id for model in logged if model.source_run_id in ended]


def collect_garbage(state: Path) -> None:
    """Lets MLflow remove what is marked as deleted, where it keeps its runs in `state`."""
    if mlflow.get_tracking_uri().startswith("http") and not keeps_runs_in(state):
        print(f"Where {mlflow.get_tracking_uri()} keeps its files, `mlflow gc` removes what was deleted.")
        return
    options = ["--backend-store-uri", database(state), "--tracking-uri", database(state)]
    end = subprocess.run([sys.executable, "-m", "mlflow", "gc", *options], capture_output=True, text=True)
    if end.returncode:
        raise WorkflowError(f"mlflow gc failed: {end.stderr.strip().splitlines()[-1]}")


def disk_use(folders: Iterable[Path]) -> int:
    """The bytes of all files in the folders; a file with two names counts once."""
    files = {}
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                status = os.lstat(os.path.join(path, name))
                files[status.st_dev, status.st_ino] = status.st_size
    return sum(files.values())
