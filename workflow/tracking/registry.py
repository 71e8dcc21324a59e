"""The registered models: what they are called, which version is the champion, and how good the champion is."""

import json
import re
import shlex
from dataclasses import replace

from workflow.data.datasets import ImageDataset
from workflow.errors import WorkflowError, first_line
from workflow.evaluation import comparison, metrics
from workflow.files import sha256
from workflow.model import served_model
from workflow.records import Comparison, Evidence, ImageFile, Results, digest_images

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

CHAMPION = "champion"  # alias of the registered version to use
LONGEST = 200  # characters of a name: MLflow takes 250, and something is put before and after it


def replace_forbidden(name: str) -> str:
    """The name with _ for each character that MLflow refuses in the names of metrics and models."""
    return re.sub(r"[^\w .-]", "_", name)


def metric_name(class_name: str) -> str:
    """The name of a class in the names of metrics; other classes always give another name."""
    name = replace_forbidden(class_name)[:LONGEST]
    return name if name == class_name else f"{name}-{sha256(class_name)[:8]}"


def model_name(class_names: list[str]) -> str:
    """The registered model's name, apples-oranges for the lab; other classes always give another name."""
    name = "-".join(class_names)
    if "-" not in "".join(class_names) and name == replace_forbidden(name) and len(name) <= LONGEST:
        return name
    return f"{replace_forbidden(name)[:LONGEST]}-{sha256(class_names)[:8]}"


def champion_version(name: str, alias: str) -> str | None:
    """The version that has the alias of the champion; None when there is none."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model, no such alias
            return None
        raise


def newest_version(name: str, has_gate: bool = False) -> ModelVersion | None:
    """Return the newest version of a registered model, or the newest that the gate has decided on; None without one."""
    if "'" in name:  # cannot be quoted in a filter, so it is not a model of this project
        return None
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
    return next((version for version in versions if not has_gate or "gate" in version.tags), None)


def list_champions(alias: str) -> list[str]:
    """Return the model URIs of all champions of this project, that of the newest finished run first."""
    names = [model.name for model in mlflow.search_registered_models() if alias in model.aliases]
    versions = [version for name in names if (version := newest_version(name, has_gate=True))]
    versions.sort(key=lambda version: version.creation_timestamp, reverse=True)
    return [f"models:/{version.name}@{alias}" for version in versions]


def describe_newest_version(images: list[ImageFile]) -> str | None:
    """Return the newest version of the images' model as text if it was trained on exactly these images; else None."""
    version = newest_version(model_name(sorted({image.class_name for image in images})))
    if version and version.tags.get("data_digest") == digest_images(images) and "gate" in version.tags:
        return f"{version.name} version {version.version}"
    return None


def load_candidate(uri: str) -> PyFuncModel:
    """Return the model that was just logged, as MLflow serves it.

    Raises:
        WorkflowError: it cannot be loaded, so that it would be of no use to anybody
    """
    try:
        return served_model.load_model(uri)
    except ValueError as error:
        raise WorkflowError(f"the model fails as it is served: {first_line(error)}") from error


def evaluate_candidate(model: PyFuncModel, test: ImageDataset) -> Results:
    """Return the results of the model that was just logged on the test images.

    Raises:
        WorkflowError: it cannot be served, or its packaged code contradicts its head, which the gate trusts
    """
    try:
        results = metrics.evaluate(model, test)
        differ = comparison.find_served_differently(model, results.predictions, test)
    except WorkflowError:
        raise
    except Exception as error:  # whatever the code that serves it raises
        raise WorkflowError(f"the model fails as it is served: {first_line(error)}") from error
    if differ:
        raise WorkflowError(f"the model fails as it is served: its answer to {differ[0]} is not that of its head")
    return results


def check_champion(class_names: list[str], alias: str) -> None:
    """Raises WorkflowError, with the remedy, when the champion cannot be asked: a training would be in vain.

    Its files may be gone, or somebody else may have registered another kind of model under the name.
    """
    name = model_name(class_names)
    if (version := champion_version(name, alias)) is None:
        return
    uri = f"models:/{name}/{version}"
    try:
        python = mlflow.models.get_model_info(uri).flavors.get("python_function", {})
        if sorted(python.get("config", {}).get("class_names", [])) != class_names:
            raise ValueError("it is no model of this project for these classes")
        there = {one.path for one in mlflow.artifacts.list_artifacts(f"{uri}/artifacts")}
        if gone := {one["path"] for one in python["artifacts"].values()} - there:
            raise ValueError(f"{' and '.join(sorted(gone))} is gone from where MLflow keeps it")
    except Exception as error:  # whatever comes of files that somebody else has made, or that are damaged
        raise WorkflowError(explain_champion(name, version, alias, error)) from error


def explain_champion(name: str, version: str, alias: str, error: Exception) -> str:
    """What is wrong with a champion, and the command that takes its alias away."""
    client = f"mlflow.MlflowClient({json.dumps(mlflow.get_tracking_uri())})"
    code = f"import mlflow; {client}.delete_registered_model_alias({json.dumps(name)}, {json.dumps(alias)})"
    told = f"{name} version {version}, the champion, cannot be used ({first_line(error)})"
    return f"{told}. To go on without it: python -c {shlex.quote(code)}"


def compare_with_champion(
    model: PyFuncModel, results: Results, own: Evidence | None, test: ImageDataset, alias: str
) -> Comparison | None:
    """Return the comparison of a candidate with the champion on the same photos; None when there is no champion.

    Args:
        model, results, own, test: as for comparison.compare()
        alias: of the champion

    Raises:
        WorkflowError: the champion fails; its message has the remedy
    """
    name = model_name(test.class_names)
    if (version := champion_version(name, alias)) is None:
        return None
    entry = mlflow.MlflowClient().get_model_version(name, version)
    try:
        champion = served_model.load_model(f"models:/{name}/{version}")
        compared = comparison.compare(model, results, own, test, champion, version, entry.run_id or "")
    except (WorkflowError, MlflowException):
        raise
    except Exception as error:  # whatever the code that serves it raises
        raise WorkflowError(explain_champion(name, version, alias, error)) from error
    return replace(compared, synthetic=test.data.synthetic and entry.tags.get("drawn") != "True")
