"""The registered model that a person asks: found, named and loaded."""

from pathlib import Path
from typing import NamedTuple

from workflow.errors import WorkflowError, first_line
from workflow.model import served_model
from workflow.model.keras_import import import_keras
from workflow.tracking import registry
from workflow.tracking.registry import CHAMPION

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

LISTED = 5  # other models, or names, that are told


class RegisteredModel(NamedTuple):
    """A loaded model, and where it comes from."""

    model: PyFuncModel
    uri: str  # with the number of the version, where it is a registered one
    alias: str  # "" when it was not asked for by an alias
    run_id: str
    data_digest: str

    @property
    def class_names(self) -> list[str]:
        return served_model.class_names(self.model)

    @property
    def origin(self) -> str:
        """Which version it is, and of which run and data, in a line."""
        alias = f" ({self.alias})" if self.alias else ""
        return f"{self.uri}{alias}, run {self.run_id}, data digest {self.data_digest[:12]}"


def find_champions() -> list[str]:
    """The model URIs of all champions, that of the newest run first; raises WorkflowError when there are none."""
    if found := registry.list_champions():
        return found
    names = [model.name for model in mlflow.search_registered_models(max_results=LISTED)]
    where = f"in MLflow at {mlflow.get_tracking_uri()}"
    if names:
        raise WorkflowError(
            f"no model is the {CHAMPION} {where}: name a version, such as --model models:/{names[0]}/1, or train again"
        )
    raise WorkflowError(f"no model is registered {where}: `python ml_workflow.py` trains one")


def load(uri: str) -> RegisteredModel:
    """The model behind a model URI; raises WorkflowError, which says what to do, when there is none."""
    exact, alias = resolve(uri) if uri.startswith("models:/") else (uri, "")
    if "://" not in uri and not uri.startswith(("models:/", "runs:/")) and not Path(uri, "MLmodel").is_file():
        raise WorkflowError(f"{uri} is no model: name one as models:/NAME@{CHAMPION}, models:/NAME/3, or by its folder")
    import_keras()
    try:
        model = served_model.load_model(exact)
    except ValueError as error:
        raise WorkflowError(f"{exact} cannot be loaded: {first_line(error)}") from error
    if not served_model.class_names(model):
        raise WorkflowError(f"{exact} is not a model of this project")
    digest = (model.metadata.metadata or {}).get("data_digest", "")
    return RegisteredModel(model, exact, alias, model.metadata.run_id or "", digest)


def resolve(uri: str) -> tuple[str, str]:
    """The model URI with the number of its version, and the alias, if it has one; raises WorkflowError.

    Another version may become the champion while the images are answered, so the number is settled first.
    """
    client, path = mlflow.MlflowClient(), uri.removeprefix("models:/")
    name, _, alias = path.partition("@")
    name, _, version = name.partition("/")
    if path.startswith("m-") and not alias and not version:  # the id of a logged model
        return uri, ""
    try:
        if not alias and not version:
            raise WorkflowError(f"{uri} names no version: write {uri.rstrip('/')}@{CHAMPION}, or models:/{name}/1")
        if alias:
            return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}", alias
        if version.isdecimal():
            client.get_model_version(name, version)
        return uri, ""
    except MlflowException as error:
        raise WorkflowError(f"{uri} is not there: {explain_missing(name, error)}") from error


def explain_missing(name: str, error: MlflowException) -> str:
    """What there is instead of a model that is not there."""
    models = mlflow.search_registered_models(max_results=LISTED + 1)
    for model in models:
        if model.name == name:
            versions = mlflow.search_model_versions(1, f"name = '{name}'", ["version_number DESC"])
            aliases = [f"models:/{name}@{alias}" for alias in model.aliases]
            newest = [f"models:/{name}/{version.version}" for version in versions]
            return f"there are {', '.join(aliases + newest) or 'no versions of it'}"
    names = ", ".join(model.name for model in models[:LISTED])
    if not names:
        return "no model is registered yet, `python ml_workflow.py` trains one"
    return f"{first_line(error)}; registered models: {names}{', ...' if len(models) > LISTED else ''}"
