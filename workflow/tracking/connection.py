"""Where MLflow keeps the runs: on the user's own server, the one of this machine, or in a database in a folder."""

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from workflow.errors import WorkflowError, explain_os_errors, first_line
from workflow.servers import (
    check_address,
    check_database,
    check_own_server,
    check_state_database,
    is_up,
    near,
    shell_command,
)
from workflow.settings import PROJECT, settings

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError


def connect_mlflow(url: str, folder: Path, experiment: str | None = None) -> None:
    """Connects MLflow to the user's own server, else to the one at the URL, else to SQLite in `folder`.

    The experiment becomes the current one, and is made when there is none.
    """
    check_address(url, "ML_WORKFLOW_MLFLOW_URL")
    mode = "r+b" if experiment else "rb"  # predict.py only reads
    if own := os.environ.get("MLFLOW_TRACKING_URI"):
        if own.startswith("http"):
            check_own_server(f"{own}/version", "MLFLOW_TRACKING_URI")
        elif own.startswith("sqlite:///"):
            check_database(Path(own.removeprefix("sqlite:///").partition("?")[0]), mode)
    elif is_up(
        f"{url}/version",
        r"\d+\.\d+.*",
        "MLflow: free it, or set MLFLOW_TRACKING_URI (to your server, or to sqlite:///mlflow.db for none)",
    ):
        mlflow.set_tracking_uri(url)
    else:
        check_state_database(folder / "mlflow.db", mode)
        mlflow.set_tracking_uri(database(folder))
    try:
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Processes that make one database together break it. A soft lock, which is a file alone, does for that, but
            # not for runs: it stays when its process dies, so that nobody could go on with a run that died.
            with FileLock(folder / ".mlflow.lock", fallback_to_soft=experiment is None):
                if experiment:
                    use_experiment(experiment, folder)
                else:
                    mlflow.search_experiments(max_results=1)
    except WorkflowError as error:
        if getattr(error.__cause__, "errno", None) == errno.ENOSYS:
            told = f"the file system of {folder} has no locks: set ML_WORKFLOW_STATE to a folder on a local disk"
            raise WorkflowError(told) from error
        raise
    except (MlflowException, SQLAlchemyError) as error:
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()}: {first_line(error)}") from None


def database(folder: Path) -> str:
    """The address of MLflow's database in a folder."""
    return f"sqlite:///{(folder / 'mlflow.db').as_posix()}"


def use_experiment(name: str, folder: Path) -> None:
    """Makes the experiment the current one; in `folder`'s own database its artifacts lie in `folder`.

    A server would otherwise keep them under an address that only a server can write to.
    """
    experiment = mlflow.get_experiment_by_name(name)
    local = not mlflow.get_tracking_uri().startswith("http")
    if experiment is None and (local or keeps_runs_in(folder)):
        mlflow.create_experiment(name, artifact_location=(folder / "mlartifacts").as_uri())
    elif experiment and local and experiment.artifact_location.startswith("mlflow-artifacts:"):
        raise WorkflowError(f"a server keeps the artifacts of {name}: start it with `mlflow server` in {folder}")
    chosen = mlflow.set_experiment(name).experiment_id
    if os.environ.get("MLFLOW_RUN_ID") and os.environ.get("MLFLOW_EXPERIMENT_ID", chosen) != chosen:
        raise WorkflowError(f"the run was opened in another experiment: mlflow run needs --experiment-name {name}")


def keeps_runs_in(folder: Path) -> bool:
    """Whether the MLflow server keeps its runs in `folder`: its first experiment was made in the same millisecond.

    MLflow 3.17 does not say where a server keeps its runs; if it did, its table need not be read.
    """
    try:
        with closing(sqlite3.connect(f"{(folder / 'mlflow.db').as_uri()}?mode=ro", uri=True)) as database:
            (created,) = database.execute("SELECT creation_time FROM experiments WHERE experiment_id = 0").fetchone()
    except sqlite3.Error:
        return False
    return created == mlflow.get_experiment("0").creation_time


def command_for_predict(*words: str) -> str:
    """A predict.py command for the shell at hand that finds the same MLflow, and the same state, as this program."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("ML_WORKFLOW_")}
    store = mlflow.get_tracking_uri()
    if store not in (settings.mlflow_url, database(settings.state)):  # else predict.py finds it by itself
        variables["MLFLOW_TRACKING_URI"] = store
    return shell_command(near(PROJECT / "predict.py"), *words, **variables)


def command_for_mlflow() -> str:
    """How to start an MLflow server that shows the runs; "" when they went to a server."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("sqlite"):
        return ""
    command = shell_command("-m", "mlflow", "server", "--backend-store-uri", uri)
    return f"To look at it, start MLflow: {command}"
