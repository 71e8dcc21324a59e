"""The gate: whether a candidate becomes the champion, the registered version to use."""

import re
from collections import Counter

from workflow.errors import WorkflowError
from workflow.images.image_folder import sha256
from workflow.judging import evaluation
from workflow.model import served_model
from workflow.running import tracking

import mlflow
from mlflow.exceptions import MlflowException


def plain(name: str) -> str:
    """The name without what MLflow refuses in the names of metrics and models."""
    return re.sub(r"[^\w .-]", "_", name)


def model_name(class_names: list[str]) -> str:
    """The registered model's name, apples-oranges for the lab; other classes always give another name."""
    name = "-".join(class_names)
    if "-" not in "".join(class_names) and name == plain(name) and len(name) <= 200:
        return name
    return f"{plain(name)[:200]}-{sha256(class_names)[:8]}"


def champion_version(name: str, alias: str) -> str | None:
    """The version that has the alias of the champion, as a string; None when there is none."""
    try:
        return str(mlflow.MlflowClient().get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model, no such alias
            return None
        raise


def newest_version(digest: str, images: list[dict]) -> str:
    """The newest version of the images' model, in words, if it was trained on just these and judged; else ""."""
    name = model_name(sorted({image["class"] for image in images}))
    newest = {"order_by": ["version_number DESC"], "max_results": 1}
    for version in mlflow.MlflowClient().search_model_versions(f"name = '{name}'", **newest):
        if version.tags.get("data_digest") == digest and "gate" in version.tags:
            return f"{name} version {version.version}"
    return ""


def judge_candidate(uri: str, test) -> dict:
    """The results of the model that was just logged, as MLflow serves it, on the test images.

    Raises WorkflowError when it cannot be served: it would be of no use to anybody.
    """
    try:
        return evaluation.judge(served_model.load_model(uri), test)
    except WorkflowError:
        raise
    except Exception as error:  # whatever the code that serves it raises
        raise WorkflowError(f"the model fails as it is served: {tracking.first_line(error)}") from error


def judge_champion(test, alias: str) -> dict | None:
    """The champion's version and results on the same test images; None when there is no champion."""
    name = model_name(test.class_names)
    if (champion := champion_version(name, alias)) is None:
        return None
    try:
        model = served_model.load_model(f"models:/{name}/{champion}")
    except (MlflowException, OSError, ValueError) as error:
        reason = tracking.first_line(error)
        raise WorkflowError(f"{name} version {champion} cannot be loaded, take its alias away: {reason}") from error
    return {"version": champion} | evaluation.judge(model, test)


def decide(candidate: dict, champion: dict | None) -> tuple[bool, str]:
    """Whether the candidate becomes the champion, and why; both are results on the same test images.

    The first one has to beat always guessing one class, a later one the champion: by accuracy, or by loss
    at the same accuracy.
    """
    labels = Counter(image["label"] for image in candidate["images"])
    total, accuracy, loss = labels.total(), candidate["test_accuracy"], candidate["test_loss"]
    if champion is None:
        guess, count = labels.most_common(1)[0]
        return accuracy > count / total, (
            f"accuracy {accuracy:.2f} on {total} test images, always guessing {guess} gets {count / total:.2f}"
        )
    better = (accuracy, -loss) > (champion["test_accuracy"], -champion["test_loss"])
    return better, (
        f"accuracy {accuracy:.2f} and loss {loss:.4f}, the champion, version {champion['version']}, has "
        f"{champion['test_accuracy']:.2f} and {champion['test_loss']:.4f} on the same {total} test images"
    )


def verdict(name: str, version: str, results: dict, alias: str) -> str:
    """Whether a registered version becomes the champion, and why, in a sentence."""
    champion, current = results["champion"], champion_version(name, alias)
    if current == str(version):
        return f"{name} version {version} is the champion: it was promoted before its run was interrupted"
    promoted, reason = decide(results, champion)
    if promoted and current != (champion and champion["version"]):
        promoted, reason = False, "another run changed the champion meanwhile; run again to compare with that one"
    return f"{name} version {version} {'is the champion' if promoted else 'is not the champion'}: {reason}"
