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
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from workflow.errors import WorkflowError, explain_os_errors
from workflow.orchestration.recovery import UNFINISHED
from workflow.text import hide_passwords
from workflow.tracking.connection import database, keeps_runs_in
from workflow.tracking.logging import explain_store_errors

import mlflow
from filelock import FileLock
from mlflow.entities import Run, ViewType

STOPPED = ("FAILED", "KILLED")


class Waste(NamedTuple):
    """What nobody needs any more: folders in `models/`, the ids of models in MLflow, and how many deleted runs."""

    folders: list[Path]
    models: list[str]
    deleted: int

    def describe(self, models: Path) -> str:
        return (
            f"{len(self.folders)} folder(s) of finished runs in {models}, {len(self.models)} model(s) without a "
            f"registered version, and {self.deleted} run(s) that you have deleted in MLflow"
        )


def clean(models: Path, state: Path, experiment: str) -> None:
    """Removes from `models` and from MLflow what nobody needs, after a person who sits there has said yes."""
    with explain_store_errors("repeat the command"), explain_os_errors(models):
        models.mkdir(parents=True, exist_ok=True)
        waste = find_waste(models, experiment)
        if waste and not is_agreed(f"Remove {waste.describe(models)}? Registered models stay."):
            raise WorkflowError("nothing was removed")
        with FileLock(models / ".scan.lock"):  # no run begins meanwhile
            before = disk_use([models, state / "mlartifacts"])
            if waste and (waste := find_waste(models, experiment)):  # the person may have thought for long
                for model_id in waste.models:
                    mlflow.MlflowClient().delete_logged_model(model_id)
                for folder in waste.folders:  # by which a later --clean knows that the run is of this folder
                    shutil.rmtree(folder)
                collect_garbage(state)
            kept = disk_use([models, state / "mlartifacts"])
        freed = (before - kept) / 1e6
        print(f"Removed {waste.describe(models)}: {freed:.1f} MB." if waste else "There is nothing to remove.")
        print(
            f"{len(mlflow.search_model_versions())} registered version(s) stay, {kept / 1e6:.0f} MB on this disk. "
            "Delete in MLflow the runs and versions that you do not need, and repeat the command."
        )


def find_waste(models: Path, experiment: str) -> Waste | None:
    """What nobody needs; None when there is nothing."""
    found = mlflow.get_experiment_by_name(experiment)
    experiments = [found.experiment_id] if found else []
    runs = list_runs(experiments)
    ended = {run.info.run_id for run in runs if is_over(run, models)}
    deleted = sum(run.info.lifecycle_stage != "active" for run in runs)
    folders = [path for path in sorted(models.iterdir()) if path.name in ended]
    versions = mlflow.search_model_versions()
    registered = {version.model_id or (version.source or "").rpartition("/")[2] for version in versions}
    unused = [model for model in list_logged_models(experiments, ended) if model not in registered]
    return Waste(folders, unused, deleted) if folders or unused or deleted else None


def is_agreed(question: str) -> bool:
    """Whether the person who sits at the terminal says yes; where nobody sits, nobody is asked."""
    if sys.stdin is None or not sys.stdin.isatty():
        return True
    with suppress(EOFError):  # Ctrl-D is a no
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    return False


def list_runs(experiments: list[str]) -> list[Run]:
    """All runs of the experiments, by their ids, with those that the user has deleted."""
    if not experiments:  # MLflow would list those of another one
        return []
    return mlflow.search_runs(experiments, run_view_type=ViewType.ALL, output_format="list")


def is_over(run: Run, models: Path) -> bool:
    """Whether a run has ended and no command can go on with it.

    On a server, a run that failed and has no folder in `models` may be somebody else's, who can go on with it.
    """
    lock = models / UNFINISHED / f"{run.data.tags.get('prefect_flow_run', '')}.lock"
    is_ours = not mlflow.get_tracking_uri().startswith("http") or (models / run.info.run_id).is_dir()
    return (run.info.status == "FINISHED" or (is_ours and run.info.status in STOPPED)) and not lock.exists()


def list_logged_models(experiments: list[str], ended: set[str]) -> list[str]:
    """The ids of the models that runs which are over have logged."""
    logged = mlflow.search_logged_models(experiments, output_format="list") if experiments else []
    return [model.model_id for model in logged if model.source_run_id in ended]


def collect_garbage(state: Path) -> None:
    """Lets MLflow remove what is marked as deleted, where it keeps its runs in `state`."""
    if mlflow.get_tracking_uri().startswith("http") and not keeps_runs_in(state):
        print(
            f"Where {hide_passwords(mlflow.get_tracking_uri())} keeps its files, `mlflow gc` removes what was deleted."
        )
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
