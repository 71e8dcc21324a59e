"""The model registry: model names, versions, and the champion, which is the version to use."""

import json
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

from workflow.data.datasets import ImageDataset
from workflow.errors import WorkflowError, first_line
from workflow.evaluation import comparison, metrics
from workflow.evaluation.metrics import MAX_NAME_LENGTH, replace_forbidden
from workflow.files import sha256
from workflow.model import served_model
from workflow.records import Comparison, Evidence, ImageFile, Results, digest_images

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from pydantic import ValidationError

CHAMPION = "champion"  # alias of the registered version to use
EVIDENCE_FILE = "cross_validation.json"  # artifact of a run


def model_name(class_names: list[str]) -> str:
    """Return the name of the registered model, distinct for each set of classes: apples-oranges for the lab."""
    name = "-".join(class_names)
    if "-" not in "".join(class_names) and name == replace_forbidden(name) and len(name) <= MAX_NAME_LENGTH:
        return name
    return f"{replace_forbidden(name)[:MAX_NAME_LENGTH]}-{sha256(class_names)[:8]}"


def champion_version(name: str) -> str | None:
    """Return the version of the champion; None if there is none."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(name, CHAMPION).version)
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


def list_champions() -> list[str]:
    """Return the model URIs of all champions of this project, that of the newest finished run first."""
    names = [model.name for model in mlflow.search_registered_models() if CHAMPION in model.aliases]
    versions = [version for name in names if (version := newest_version(name, has_gate=True))]
    versions.sort(key=lambda version: version.creation_timestamp, reverse=True)
    return [f"models:/{version.name}@{CHAMPION}" for version in versions]


def describe_newest_version(images: list[ImageFile]) -> str | None:
    """Return the newest version of the images' model as text if it was trained on exactly these images; else None."""
    version = newest_version(model_name(sorted({image.class_name for image in images})))
    if version and version.tags.get("data_digest") == digest_images(images) and "gate" in version.tags:
        return f"{version.name} version {version.version}"
    return None


def load_candidate(uri: str) -> PyFuncModel:
    """Load a logged model as MLflow serves it.

    Raises:
        WorkflowError: it cannot be loaded
    """
    try:
        return served_model.load_model(uri)
    except ValueError as error:
        raise WorkflowError(f"the model fails as it is served: {first_line(error)}") from error


def evaluate_candidate(model: PyFuncModel, test: ImageDataset) -> Results:
    """Return the results of a logged model on the test images.

    Raises:
        WorkflowError: its packaged code fails, or disagrees with its head, which the gate compares
    """
    try:
        results = metrics.evaluate(model, test)
        mismatches = comparison.find_head_mismatches(model, results.predictions, test)
    except WorkflowError:
        raise
    except Exception as error:  # packaged code may raise anything
        raise WorkflowError(f"the model fails as it is served: {first_line(error)}") from error
    if mismatches:
        raise WorkflowError(f"the model fails as it is served: its head disagrees on {mismatches[0]}")
    return results


def check_champion(class_names: list[str]) -> None:
    """Check that the champion, if there is one, can be loaded: otherwise the gate would fail after the training.

    Raises:
        WorkflowError: its files are missing, or it is not a model of this project; the message has the remedy
    """
    name = model_name(class_names)
    if version := champion_version(name):
        try:
            check_files(f"models:/{name}/{version}", class_names)
        except Exception as error:  # damaged or foreign files may raise anything
            raise unusable_champion(name, version, error) from error


def check_files(uri: str, class_names: list[str]) -> None:
    """Raise ValueError if a registered version has other classes or lacks an artifact."""
    flavor = mlflow.models.get_model_info(uri).flavors.get("python_function", {})
    if sorted(flavor.get("config", {}).get("class_names", [])) != class_names:
        raise ValueError("it is not a model of this project for these classes")
    required = {artifact["path"] for artifact in flavor["artifacts"].values()}
    if missing := required - {artifact.path for artifact in mlflow.artifacts.list_artifacts(f"{uri}/artifacts")}:
        raise ValueError(f"missing in MLflow's artifacts: {', '.join(sorted(missing))}")


def unusable_champion(name: str, version: str, error: Exception) -> WorkflowError:
    """Return the error for a champion that fails, with the command that removes its alias."""
    client = f"mlflow.MlflowClient({json.dumps(mlflow.get_tracking_uri())})"
    code = f"import mlflow; {client}.delete_registered_model_alias({json.dumps(name)}, {json.dumps(CHAMPION)})"
    return WorkflowError(
        f"{name} version {version}, the champion, cannot be used ({first_line(error)}). "
        f"To continue without it: python -c {shlex.quote(code)}"
    )


def compare_with_champion(
    model: PyFuncModel, results: Results, evidence: Evidence | None, test: ImageDataset
) -> Comparison | None:
    """Compare a candidate with the champion on the same photos; return None if there is no champion.

    Args:
        model: the candidate
        results: its results on the test images
        evidence: results of its cross-validation; None without a backbone
        test: the test dataset

    Raises:
        WorkflowError: the champion fails; the message has the remedy
    """
    name = model_name(test.class_names)
    if (version := champion_version(name)) is None:
        return None
    entry = mlflow.MlflowClient().get_model_version(name, version)
    try:
        champion, champion_evidence = served_model.load_model(f"models:/{name}/{version}"), read_evidence(entry.run_id)
        compared = comparison.compare(model, results, evidence, test, champion, champion_evidence, version)
    except (WorkflowError, MlflowException):
        raise
    except Exception as error:  # packaged code may raise anything
        raise unusable_champion(name, version, error) from error
    is_synthetic = "True" in (entry.tags.get("synthetic"), entry.tags.get("drawn"))  # earlier releases: drawn
    return replace(compared, synthetic=test.data.synthetic and not is_synthetic)


def read_evidence(run_id: str | None) -> Evidence | None:
    """Return the cross-validation results of a run; None if there are none, or those of an incompatible release."""
    if EVIDENCE_FILE not in {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run_id or "")}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=EVIDENCE_FILE, dst_path=folder)
        try:
            evidence = Evidence.read(Path(path))
        except ValidationError:
            return None
    return evidence if evidence.training_images else None
