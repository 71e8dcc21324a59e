"""Find and load the registered model that predict.py and serve.py use.

LiteRT runs a model whose stored export agrees with it. Keras, with the code packaged with the model, runs all others.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from workflow.errors import WorkflowError, first_line
from workflow.image_classifier import Classifier
from workflow.model import served_model
from workflow.model.keras_import import import_keras
from workflow.records import Artifact, DataVersion, RunData
from workflow.serving.litert_classifier import load_export
from workflow.tracking.connection import find_other_models
from workflow.tracking.logging import read_artifact
from workflow.tracking.registry import CHAMPION, list_champions, newest_version

import mlflow
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

MAX_LISTED_MODELS = 5  # in a message
TRAIN = "; train one with `python ml_workflow.py`"
Runtime = Literal["LiteRT", "Keras"]


class RegisteredModel(NamedTuple):
    """A loaded model and where it comes from."""

    classifier: Classifier  # with Keras the packaged one, of any release
    runtime: Runtime
    uri: str  # for a registered version, with the version number
    alias: str  # "" if it was not loaded by alias
    run_id: str
    data_digest: str
    model_id: str = ""  # of the logged model; only with Keras
    why_keras: str = ""  # why it runs with Keras although LiteRT was requested

    @property
    def class_names(self) -> list[str]:
        return self.classifier.class_names

    @property
    def origin(self) -> str:
        """The version, run and data digest, in one line."""
        alias = f" ({self.alias})" if self.alias else ""
        return f"{self.uri}{alias}, run {self.run_id}, data digest {self.data_digest[:12]}"


def read_data(run_id: str) -> DataVersion:
    """Return the data version from a run's evaluation; an empty one if the evaluation is missing or unreadable."""
    try:
        return RunData.from_json(read_artifact(run_id, Artifact.EVALUATION) or b"").data
    except ValidationError:
        return DataVersion("", "", [])


def find_common_classes(registered: RegisteredModel, against: RegisteredModel | None) -> list[str]:
    """Return the classes that both models have; without a second model, all classes of the first.

    Raises:
        WorkflowError: they have none in common
    """
    names = [name for name in registered.class_names if not against or name in against.class_names]
    if against and not names:
        raise WorkflowError(
            f"{registered.uri} and {against.uri} have no class in common; compare models of the same classes"
        )
    return names


def find_champions() -> list[str]:
    """Return the model URIs of all champions, newest run first.

    Raises:
        WorkflowError: there is no champion
    """
    if uris := list_champions():
        return uris
    store = f"MLflow at {mlflow.get_tracking_uri()}"
    for model in mlflow.search_registered_models(max_results=1):
        remedy = f"choose a version, such as --model models:/{model.name}/1, or train again"
        raise WorkflowError(f"no model in {store} has the alias {CHAMPION}; {remedy}")
    raise WorkflowError(f"no model is registered in {store}{find_other_models() or TRAIN}")


def load(uri: str, runtime: Runtime = "LiteRT") -> RegisteredModel:
    """Load the model at a model URI.

    Args:
        uri: MLflow model URI, or a model folder
        runtime: LiteRT falls back to Keras if the model has no export that agrees with it

    Raises:
        WorkflowError: there is no such model, it cannot be loaded, or it belongs to another project
    """
    exact_uri, alias = resolve(uri) if uri.startswith("models:/") else (uri, "")
    if "://" not in uri and not uri.startswith(("models:/", "runs:/")) and not Path(uri, "MLmodel").is_file():
        raise WorkflowError(f"{uri} is not a model; use models:/NAME@{CHAMPION}, models:/NAME/3, or a model folder")
    why_keras = ""
    if runtime == "LiteRT":
        exported = load_export(exact_uri)
        if not isinstance(exported, str):
            return RegisteredModel(exported, "LiteRT", exact_uri, alias, exported.run_id, exported.data_digest)
        why_keras = exported
    if find_spec("tensorflow") is None:
        raise WorkflowError(explain_missing_tensorflow(exact_uri, why_keras))
    return load_with_keras(exact_uri, alias, why_keras)


def explain_missing_tensorflow(uri: str, why_keras: str) -> str:
    """Return the message for a model that needs Keras where TensorFlow is not installed."""
    if not why_keras:
        return "explaining predictions and exporting a model require TensorFlow: pip install -r requirements.txt"
    command = f"python predict.py --export FOLDER --model {uri}"
    return f"{uri} needs TensorFlow, because {why_keras}; where TensorFlow is installed, run `{command}`"


def load_with_keras(uri: str, alias: str, why_keras: str) -> RegisteredModel:
    """Load a model with Keras and the code packaged with it."""
    import_keras()
    try:
        model = served_model.load_model(uri)
    except ValueError as error:
        raise WorkflowError(f"{uri} cannot be loaded: {first_line(error)}") from error
    if not served_model.class_names(model):
        raise WorkflowError(f"{uri} is not a model from this project")
    classifier: Any = model.unwrap_python_model()
    classifier.unsure_below = getattr(classifier, "unsure_below", None)  # version 1.0 had no threshold
    metadata = model.metadata
    digest = (metadata.metadata or {}).get("data_digest", "")
    origin = uri, alias, metadata.run_id or "", digest
    return RegisteredModel(classifier, "Keras", *origin, metadata.model_id or "", why_keras)


def resolve(uri: str) -> tuple[str, str]:
    """Return a model URI with a version number instead of an alias, and the alias or "".

    Pinning the version matters because the alias may be reassigned while images are being classified.

    Raises:
        WorkflowError: there is no such model, version or alias
    """
    client, path = mlflow.MlflowClient(), uri.removeprefix("models:/")
    name, _, alias = path.partition("@")
    name, _, version = name.partition("/")
    if path.startswith("m-") and not alias and not version:  # the id of a logged model
        return uri, ""
    if not alias and not version:
        raise WorkflowError(f"{uri} names no version; {describe_alternatives(name)}")
    try:
        if alias:
            return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}", alias
        if version.isdecimal():
            client.get_model_version(name, version)
        return uri, ""
    except MlflowException as error:
        raise WorkflowError(f"{uri} does not exist; {describe_alternatives(name)}") from error


def describe_alternatives(name: str) -> str:
    """Return the versions of a registered model as text; if there is no such model, the names of others."""
    models = mlflow.search_registered_models(max_results=MAX_LISTED_MODELS + 1)
    for model in models:
        if model.name == name:
            uris = [f"models:/{name}@{alias}" for alias in model.aliases]
            uris += [f"models:/{name}/{version.version}, the newest"] if (version := newest_version(name)) else []
            return f"use {' or '.join(uris)}" if uris else "this model has no versions; train again"
    if not models:
        return f"no model is registered in MLflow at {mlflow.get_tracking_uri()}{find_other_models() or TRAIN}"
    names = ", ".join(model.name for model in models[:MAX_LISTED_MODELS])
    more = ", ..." if len(models) > MAX_LISTED_MODELS else ""
    return f"MLflow at {mlflow.get_tracking_uri()} has {names}{more}{find_other_models()}"
