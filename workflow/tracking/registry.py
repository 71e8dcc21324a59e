"""Register models in MLflow: names, versions, and the champion, which is the version to use."""

import functools
import itertools
import json
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workflow.data.datasets import ImageDataset
from workflow.data.features import features_key
from workflow.errors import WorkflowError, first_line
from workflow.evaluation import comparison, gate, metrics
from workflow.evaluation.metrics import replace_forbidden
from workflow.evaluation.report_formats import escape_markdown
from workflow.files import locked, sha256
from workflow.model import served_model
from workflow.model.backbone import LENGTH
from workflow.records import (
    Artifact,
    Comparison,
    Decision,
    Evaluation,
    Evidence,
    ImageFile,
    Prediction,
    Results,
    digest_images,
)
from workflow.tracking.logging import describe_run, find_logged_model, read_artifact

import mlflow
import numpy as np
from mlflow.entities import Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import ValidationError

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel  # which imports pandas

CHAMPION = "champion"  # alias of the registered version to use
MAX_NAME_LENGTH = 60  # characters for class names in a default name


def model_name(class_names: list[str], chosen: str = "") -> str:
    """Return the chosen name of a registered model, by default one that is unique to its classes: apples-oranges.

    A name for many classes lists only the first few, as in apples-bananas-kiwis-and-9-more-1a2b3c4d.
    """
    name = "-".join(class_names)
    if chosen or ("-" not in "".join(class_names) and name == replace_forbidden(name) and len(name) <= MAX_NAME_LENGTH):
        return chosen or name
    ends = itertools.accumulate(len(class_name) + 1 for class_name in class_names)
    listed = [class_name for class_name, end in zip(class_names, ends, strict=True) if end <= MAX_NAME_LENGTH]
    listed = listed or [class_names[0][:MAX_NAME_LENGTH]]
    rest = f"-and-{len(class_names) - len(listed)}-more" if len(listed) < len(class_names) else ""
    return f"{replace_forbidden('-'.join(listed))}{rest}-{sha256(class_names)[:8]}"


def champion_version(name: str) -> str | None:
    """Return the version of the champion; None if there is none."""
    if "'" in name:  # not a model from this project, and cannot be quoted in a filter
        return None
    models = mlflow.MlflowClient().search_registered_models(f"name = '{name}'")
    return next((str(model.aliases[CHAMPION]) for model in models if CHAMPION in model.aliases), None)


def newest_version(name: str, decided_only: bool = False) -> ModelVersion | None:
    """Return the newest version of a registered model, or the newest that the gate has decided on."""
    if "'" in name:  # not a model from this project, and cannot be quoted in a filter
        return None
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
    return next((version for version in versions if not decided_only or "gate" in version.tags), None)


def list_champions() -> list[str]:
    """Return the model URIs of all champions of this project, newest finished run first.

    Champions that were trained on the synthetic sample images come last.
    """
    champions = []
    for model in mlflow.search_registered_models():
        if (number := model.aliases.get(CHAMPION)) and (newest := newest_version(model.name, decided_only=True)):
            champion = mlflow.MlflowClient().get_model_version(model.name, number)
            champions.append((not is_synthetic(champion), newest.creation_timestamp, model.name))
    return [f"models:/{name}@{CHAMPION}" for *_, name in sorted(champions, reverse=True)]


def find_version_trained_on(images: list[ImageFile], name: str = "") -> str | None:
    """Return the newest version of a model, as text, if it was trained on exactly these images; see model_name()."""
    version = newest_version(model_name(sorted({image.class_name for image in images}), name))
    if version and version.tags.get("data_digest") == digest_images(images) and "gate" in version.tags:
        return f"{version.name} version {version.version}"
    return None


def load_candidate(model_id: str) -> "PyFuncModel":
    """Load a logged model as MLflow serves it.

    Raises:
        WorkflowError: it cannot be loaded
    """
    try:
        return served_model.load_model(f"models:/{model_id}")
    except ValueError as error:
        raise WorkflowError(f"the logged model cannot be loaded: {first_line(error)}") from error


def evaluate_candidate(model: "PyFuncModel", test: ImageDataset) -> Results:
    """Return the results of a logged model on the test images.

    Raises:
        WorkflowError: its serving code fails, or predicts different classes from its head, which the gate relies on
    """
    try:
        results = metrics.summarize(metrics.predict_files(model, test.data, test.file_names))
        mismatches = comparison.find_head_mismatches(model, results.predictions, test)
    except WorkflowError:
        raise
    except Exception as error:  # serving code may raise any exception
        raise WorkflowError(f"the logged model cannot predict the test images: {first_line(error)}") from error
    if mismatches:
        raise WorkflowError(f"the logged model's serving code and head predict different classes for {mismatches[0]}")
    return results


def check_champion(class_names: list[str], name: str = "") -> None:
    """Check that the champion, if there is one, can be loaded; otherwise, the comparison would fail after training.

    Raises:
        WorkflowError: its files are missing, or it is not a model from this project; the message has the remedy
    """
    name = model_name(class_names, name)
    if version := champion_version(name):
        try:
            check_files(f"models:/{name}/{version}", class_names)
        except Exception as error:  # files that are damaged or from another project may raise any exception
            raise unusable_champion(name, version, error) from error


def check_files(uri: str, class_names: list[str]) -> None:
    """Raise ValueError if a registered version has different classes or if one of its files is missing."""
    flavor = mlflow.models.get_model_info(uri).flavors.get("python_function", {})
    if sorted(flavor.get("config", {}).get("class_names", [])) != class_names:
        raise ValueError("it is not a model from this project for these classes")
    required = {artifact["path"] for artifact in flavor["artifacts"].values()}
    if missing := required - {artifact.path for artifact in mlflow.artifacts.list_artifacts(f"{uri}/artifacts")}:
        raise ValueError(f"missing from MLflow's artifacts: {', '.join(sorted(missing))}")


def unusable_champion(name: str, version: str, error: Exception) -> WorkflowError:
    """Return the error for a champion that cannot be used, with the command that removes its alias."""
    client = f"mlflow.MlflowClient({json.dumps(mlflow.get_tracking_uri())})"
    code = f"import mlflow; {client}.delete_registered_model_alias({json.dumps(name)}, {json.dumps(CHAMPION)})"
    return WorkflowError(
        f"{name} version {version}, the champion, cannot be used ({first_line(error)}). "
        f"Use another --name, or remove the alias: python -c {shlex.quote(code)}"
    )


def compare_with_champion(
    model: "PyFuncModel", results: Results, evidence: Evidence | None, test: ImageDataset
) -> Comparison | None:
    """Compare a candidate with the champion on the same photos; return None if there is no champion.

    Raises:
        WorkflowError: the champion fails; the message has the remedy
    """
    name = model_name(test.class_names, test.data.model_name)
    if (version := champion_version(name)) is None:
        return None
    entry = mlflow.MlflowClient().get_model_version(name, version)
    try:
        compared = comparison.compare(model, results, evidence, test, find_champion(entry))
    except (WorkflowError, MlflowException):
        raise
    except Exception as error:  # serving code may raise any exception
        raise unusable_champion(name, version, error) from error
    champion_synthetic = is_synthetic(entry)
    return replace(
        compared,
        synthetic=test.data.synthetic and not champion_synthetic,
        champion_synthetic=champion_synthetic and not test.data.synthetic,
        same_task=bool(test.data.model_name) or champion_synthetic,
    )


def is_synthetic(version: ModelVersion) -> bool:
    """Return whether a version was trained on the synthetic sample images."""
    return "True" in (version.tags.get("synthetic"), version.tags.get("drawn"))  # "drawn" in earlier releases


def find_champion(entry: ModelVersion) -> comparison.Champion:
    """Return the champion and what its run stored, without loading the model."""
    uri, evidence = f"models:/{entry.name}/{entry.version}", read_evidence(entry.run_id)
    served: list[Prediction] = []
    references: dict[str, np.ndarray] = {}
    if evidence:
        if content := read_artifact(entry.run_id or "", Artifact.EVALUATION):
            served = Evaluation.from_json(content).test.predictions
        path = f"{uri}/artifacts/{Artifact.REFERENCE_EMBEDDINGS}"
        with (
            tempfile.TemporaryDirectory() as folder,
            np.load(mlflow.artifacts.download_artifacts(path, dst_path=folder)) as saved,
        ):
            references = dict(zip(saved["files"].tolist(), LENGTH * saved["features"].astype("float32"), strict=True))
    load = functools.cache(functools.partial(served_model.load_model, uri))
    return comparison.Champion(str(entry.version), load, evidence, served, references)


def read_evidence(run_id: str | None) -> Evidence | None:
    """Return the cross-validation results of a run; None if they are missing or from an incompatible release."""
    try:
        evidence = Evidence.from_json(read_artifact(run_id or "", Artifact.EVIDENCE) or b"")
    except ValidationError:
        return None
    return evidence if evidence.features_key == features_key() else None


def register_version(run: Run, evaluation: Evaluation) -> ModelVersion:
    """Register the model that a run logged, with tags for its data and its test results."""
    data = evaluation.data
    tags = {
        "data_digest": data.digest,
        "source": data.source,
        "synthetic": data.synthetic,
        "test_loss": evaluation.test.loss,
        "test_accuracy": evaluation.test.accuracy,
        "prefect_flow_run": run.data.tags.get("prefect_flow_run", "none"),
    }
    name = model_name(data.class_names, data.model_name)
    return mlflow.register_model(f"models:/{find_logged_model(run)}", name, tags=tags)


def apply_decision(
    decision: Decision, version: ModelVersion, comparison: Comparison | None, lock_file: Path
) -> Decision:
    """Make a promoted version the champion, unless another run has changed the champion since the comparison.

    Args:
        decision: the gate's decision
        version: the candidate
        comparison: comparison with the champion; None if there was none
        lock_file: locked during the change, so that only one run at a time changes the champion

    Returns:
        The final decision.
    """
    client, number = mlflow.MlflowClient(), str(version.version)
    with locked(lock_file):
        decision = gate.confirm(decision, comparison.version if comparison else None, champion_version(version.name))
        client.set_model_version_tag(version.name, number, "gate", gate.describe(version.name, number, decision))
        if decision.promoted:
            client.set_registered_model_alias(version.name, CHAMPION, number)
    return decision


def was_promoted(run: Run) -> bool:
    """Return whether the version that a run registered became the champion, as log_decision() recorded it."""
    return run.data.tags["promoted"] == str(True)


def log_decision(
    decision: Decision, version: ModelVersion, run: Run, evaluation: Evaluation, evidence: Evidence | None
) -> str:
    """Add the decision to the descriptions of the registered version and the run, and return it as a sentence.

    Args:
        decision: the gate's decision
        version: the candidate
        run: the run that trained it
        evaluation: evaluation of the candidate
        evidence: results of its cross-validation; None without a backbone
    """
    client, number = mlflow.MlflowClient(), str(version.version)
    summary = gate.describe(version.name, number, decision)
    test = metrics.describe_test(evaluation.test.predictions, evaluation.candidate)
    text = f"{escape_markdown(summary)}.\n\n{test}"
    client.update_model_version(version.name, number, text)
    suffix = f"@{CHAMPION}" if champion_version(version.name) else f"/{number}"
    tags = {"gate": summary, "promoted": str(decision.promoted), "model_uri": f"models:/{version.name}{suffix}"}
    client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    result = gate.format_run_name(number, decision, evaluation.test.accuracy, evidence)
    describe_run(run.info.run_id, result, f"{text}\n\n{escape_markdown(evaluation.data.describe())}")
    return summary
