"""Connect to MLflow at MLFLOW_TRACKING_URI, to a server on this machine, or to a database in a folder."""

import errno
import os
import shlex
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

from workflow.cli import shell_command
from workflow.errors import WorkflowError, explain_os_errors, first_line
from workflow.files import locked
from workflow.servers import (
    check_address,
    check_custom_server,
    check_database,
    check_server_version,
    check_state_database,
    is_up,
    listening_port,
)
from workflow.settings import PROJECT, Settings, settings
from workflow.tracking.database import migrate, to_path, update_addresses

import mlflow
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

DESCRIPTION = (  # of the experiment; MLflow's UI (3.17) shows its first line above the list of runs
    "Compare the accuracy of runs in the chart view, the second button below.\n\n"
    "The page that the Compare button opens shows the CPU load first; choose `test_accuracy` under Metrics there. "
    "To see more of a page, close the assistant on the right, which opens by itself only once."
)
MAX_OTHER_MODELS = 3  # in a message


def connect_mlflow(url: str, folder: Path, experiment: str | None = None) -> None:
    """Use MLFLOW_TRACKING_URI if it is set, else a server at `url` if one is running, else `folder`/mlflow.db.

    Args:
        url: address of a server on this machine
        folder: contains the database
        experiment: experiment to select or create; None for a program that only reads

    Raises:
        WorkflowError: the server or the database cannot be used
    """
    remedy = select_store(url, folder, "r+b" if experiment else "rb")
    check_registry()
    try:
        with explain_os_errors(folder):
            open_store(folder, experiment)
        if experiment and (selected := mlflow.get_experiment_by_name(experiment)):
            check_artifact_location(selected, folder, remedy)
    except WorkflowError as error:
        if getattr(error.__cause__, "errno", None) == errno.ENOSYS:
            message = f"the file system of {folder} does not support locks; set ML_WORKFLOW_STATE to a local folder"
            raise WorkflowError(message) from error
        raise
    except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()}{uri_origin()}: {first_line(error)}") from None
    except ImportError as error:  # SQLAlchemy needs a driver for each kind of database
        remedy = "install it with pip, or change MLFLOW_TRACKING_URI"
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()} needs the package {error.name}; {remedy}") from None


def select_store(url: str, folder: Path, mode: str) -> str:
    """Select the tracking store, and return how to use another one, for error messages.

    Args:
        url: address of a server on this machine
        folder: contains the database
        mode: mode in which a database must be accessible
    """
    check_address(url, "ML_WORKFLOW_MLFLOW_URL")
    remedy = "unset MLFLOW_TRACKING_URI"
    if custom := os.environ.get("MLFLOW_TRACKING_URI"):
        check_project_run(custom, url, folder)
        if custom.startswith("http"):
            check_custom_server(f"{custom}/version", "set by MLFLOW_TRACKING_URI", remedy)
        elif file := sqlite_file(custom):
            check_database(file, mode)
    elif is_up(f"{url}/version", r"\d+\.\d+.*", "MLflow", "MLFLOW_TRACKING_URI=sqlite:///mlflow.db"):
        mlflow.set_tracking_uri(url)
        remedy = "set ML_WORKFLOW_MLFLOW_URL to an unused port, such as http://127.0.0.1:5003"
    else:
        check_state_database(folder / "mlflow.db", mode)
        mlflow.set_tracking_uri(database_uri(folder))
    if mlflow.get_tracking_uri().startswith("http"):
        check_server_version(f"{mlflow.get_tracking_uri()}/version", "MLflow", mlflow.__version__, remedy)
    return remedy


def check_registry() -> None:
    """Raise WorkflowError if MLFLOW_REGISTRY_URI selects a different store for registered models than for runs.

    A version refers to its run and its logged model, and registering it would fail only after training.
    """
    registry = os.environ.get("MLFLOW_REGISTRY_URI", "")
    if registry and absolute_uri(registry).rstrip("/") != tracking_uri().rstrip("/"):
        raise WorkflowError(
            f"MLFLOW_REGISTRY_URI={registry} is a different store from that of the runs, {tracking_uri()}; "
            "unset MLFLOW_REGISTRY_URI, or set MLFLOW_TRACKING_URI to the same store"
        )


def check_project_run(custom: str, url: str, folder: Path) -> None:
    """Raise WorkflowError if `mlflow run` has created the run in a database although ML_WORKFLOW_MLFLOW_URL is set.

    Args:
        custom: value of MLFLOW_TRACKING_URI, which `mlflow run` also sets
        url: address of a server on this machine
        folder: contains the database
    """
    is_set = "mlflow_url" in settings.model_fields_set
    if os.environ.get("MLFLOW_RUN_ID") and custom.startswith("sqlite:") and is_set:
        uri = url if is_up(f"{url}/version", ".*", "MLflow", "MLFLOW_TRACKING_URI") else database_uri(folder)
        if uri != tracking_uri():
            remedy = f"MLFLOW_TRACKING_URI={shlex.quote(uri)}"
            raise WorkflowError(f"`mlflow run` ignores ML_WORKFLOW_MLFLOW_URL and uses {custom}; set {remedy}")


def find_other_models() -> str:
    """Return a note, for messages, about models registered in the state folder's database; "" if there are none."""
    uri = database_uri(settings.state)
    if uri == tracking_uri() or not (settings.state / "mlflow.db").exists():
        return ""
    with suppress(MlflowException, SQLAlchemyError):
        models = mlflow.MlflowClient(uri, uri).search_registered_models(max_results=MAX_OTHER_MODELS)
        if names := ", ".join(model.name for model in models):
            return (
                f"; {settings.state / 'mlflow.db'} has {names}: to use it, set MLFLOW_TRACKING_URI={shlex.quote(uri)}"
            )
    return ""


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite tracking URI; None for any other URI."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def open_store(folder: Path, experiment: str | None) -> None:
    """Prepare and open the tracking store, and select the experiment if one is given.

    The lock prevents processes that start together from creating the same database. On a file system without locks, a
    program that only reads falls back to a soft lock. A run does not: its own lock, which shows later runs whether its
    process is alive, would not work there either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".mlflow.lock", fallback_to_soft=experiment is None):
        if file := sqlite_file(mlflow.get_tracking_uri()):
            migrate(file)
        if (file := file or folder / "mlflow.db").exists():  # a server may be using it
            update_addresses(file, folder)
        if experiment:
            select_experiment(experiment, folder)
        else:
            mlflow.search_experiments(max_results=1)


def uri_origin() -> str:
    """Return a note, for messages, that the user has set MLFLOW_TRACKING_URI; "" if this module chose the store."""
    return "" if tracking_uri() in (settings.mlflow_url, database_uri(settings.state)) else " (MLFLOW_TRACKING_URI)"


def tracking_uri() -> str:
    """Return the tracking URI, with the absolute path of a database, so that it is valid in every folder."""
    return absolute_uri(mlflow.get_tracking_uri())


def absolute_uri(uri: str) -> str:
    """Return a store's URI, with the absolute path of a database."""
    scheme, separator, file = uri.partition(":///")
    return f"{scheme}{separator}{os.path.abspath(file)}" if scheme == "sqlite" and file else uri


def database_uri(folder: Path) -> str:
    """Return the tracking URI of the database in a folder."""
    return f"sqlite:///{(folder / 'mlflow.db').as_posix()}"


def select_experiment(name: str, folder: Path) -> None:
    """Select an experiment, and create it if necessary.

    If its runs are stored in `folder`/mlflow.db, its artifacts are stored in `folder`/mlartifacts under a file URI, so
    that runs can write them both with and without a server.
    """
    experiment = mlflow.get_experiment_by_name(name)
    if experiment and experiment.lifecycle_stage == "deleted":
        restore = ("experiments", "restore", "--experiment-id", experiment.experiment_id)
        command = shell_command("-m", "mlflow", *restore, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri())
        raise WorkflowError(f"experiment {name} was deleted in MLflow; to restore it: {command}")
    is_local = not mlflow.get_tracking_uri().startswith("http")
    if experiment is None and (is_local or serves_database_in(folder)):
        mlflow.create_experiment(name, artifact_location=(folder / "mlartifacts").as_uri())
    elif experiment and is_local and experiment.artifact_location.startswith("mlflow-artifacts:"):
        raise WorkflowError(
            f"the artifacts of experiment {name} can only be stored through a server; run `mlflow server` in {folder}"
        )
    experiment = mlflow.set_experiment(name)
    if "mlflow.note.content" not in experiment.tags:
        mlflow.set_experiment_tag("mlflow.note.content", DESCRIPTION)
    if (run := find_given_run()) and run.info.experiment_id != experiment.experiment_id:
        raise WorkflowError(f"`mlflow run` used a different experiment; add --experiment-name {name}")


def find_given_run() -> Run | None:
    """Return the run in MLFLOW_RUN_ID, which `mlflow run` has created and this program will use; None if it is not set.

    Raises:
        WorkflowError: it is not new, so its results would be overwritten
    """
    if not (run_id := os.environ.get("MLFLOW_RUN_ID")):
        return None
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        raise WorkflowError(f"MLFLOW_RUN_ID: {first_line(error)}; unset the variable") from error
    if run.info.status != "RUNNING" or run.info.lifecycle_stage != "active" or "prefect_flow_run" in run.data.tags:
        raise WorkflowError(f"MLFLOW_RUN_ID names a run that is not new, {run.info.run_name}; unset the variable")
    return run


def check_artifact_location(experiment: Experiment, folder: Path, remedy: str) -> None:
    """Raise WorkflowError if runs of an experiment would write to another project's folder.

    Args:
        experiment: the selected experiment
        folder: the project's folder
        remedy: how to use a different store
    """
    uri, path = mlflow.get_tracking_uri(), to_path(experiment.artifact_location)
    file = sqlite_file(uri)
    homes = [home.resolve() for home in (folder, file.parent if file else folder)]
    if path is None or any(path.resolve().is_relative_to(home) for home in homes):
        return
    if file:
        remedy = f"copy it to {homes[1]}, or create an empty {homes[1] / 'mlartifacts'} to continue without its files"
    raise WorkflowError(
        f"MLflow at {uri} stores the artifacts of experiment {experiment.name} in another folder, {path}; {remedy}"
    )


def serves_database_in(folder: Path) -> bool:
    """Return whether the MLflow server uses `folder`/mlflow.db.

    MLflow (3.17) has no API for this, so compare the creation times of the default experiment.
    """
    if not (folder / "mlflow.db").exists():
        return False
    local = mlflow.MlflowClient(database_uri(folder)).get_experiment("0")
    return local.creation_time == mlflow.get_experiment("0").creation_time


def command_for(program: str, *arguments: str) -> str:
    """Return a shell command for predict.py or serve.py with this program's tracking store and settings."""
    names = {f"ML_WORKFLOW_{name.upper()}" for name in type(settings).model_fields if name != "token"}
    variables: dict[str, Any] = {name: value for name, value in os.environ.items() if name in names}
    if "ML_WORKFLOW_STATE" in variables:
        variables["ML_WORKFLOW_STATE"] = str(settings.state)
    uri = tracking_uri()
    if uri not in (settings.mlflow_url, database_uri(settings.state)):  # the program uses these two by default
        variables["MLFLOW_TRACKING_URI"] = uri
    return shell_command(str(PROJECT / program), *arguments, **variables)


def describe_mlflow_command() -> str:
    """Return a line with the command that starts an MLflow server to view the runs; "" if a server stores them."""
    uri = tracking_uri()
    if not uri.startswith("sqlite"):
        return ""
    arguments = ["-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", uri]
    if settings.mlflow_url != Settings.model_fields["mlflow_url"].default:
        arguments += ["--port", str(listening_port(settings.mlflow_url))]
    return f"To see the runs, start MLflow: {shell_command(*arguments, folder=settings.state)}"
