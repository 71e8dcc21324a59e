"""The gate: whether a candidate becomes the champion, the registered version to use."""

import base64
import re
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import tracking
import report
from tracking import WorkflowError
from image_folder import sha256

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException

FEW = 20  # batches that are judged sooner than TensorFlow has made a graph of the model


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


def judge(model, test) -> dict:
    """A model's results on the test images: cross-entropy, accuracy, recall by class, and the answer to each image."""
    import keras

    labels = np.array([label for _, batch in test.as_numpy_iterator() for label in batch])
    model.compile(run_eagerly=len(test) <= FEW)
    probabilities = model.predict(test, verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy()(labels, probabilities)  # without what training adds to it
    accuracy = np.mean(probabilities.argmax(axis=1) == labels)
    answers = report.answers(test.class_names, test.file_names, labels, probabilities)
    return {"test_loss": float(loss), "test_accuracy": float(accuracy)} | answers


def judge_champion(test, alias: str) -> dict | None:
    """The champion's version and results on the same test images; None when there is no champion."""
    name = model_name(test.class_names)
    if (champion := champion_version(name, alias)) is None:
        return None
    try:
        model = tracking.load_model(f"models:/{name}/{champion}").unwrap_python_model().model
    except (MlflowException, OSError, ValueError) as error:
        reason = tracking.first_line(error)
        raise WorkflowError(f"{name} version {champion} cannot be loaded, take its alias away: {reason}") from error
    return {"version": champion} | judge(model, test)


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


def verdict(name: str, version: str, results: dict, alias: str, tolerance: float) -> str:
    """Whether a registered version becomes the champion, and why, in a sentence."""
    champion, current = results["champion"], champion_version(name, alias)
    if current == str(version):
        return f"{name} version {version} is the champion: it was promoted before its run was interrupted"
    fault = check_serving(f"models:/{name}/{version}", results, tolerance)
    promoted, reason = (False, fault) if fault else decide(results, champion)
    if promoted and current != (champion and champion["version"]):
        promoted, reason = False, "another run changed the champion meanwhile; run again to compare with that one"
    return f"{name} version {version} {'is the champion' if promoted else 'is not the champion'}: {reason}"


def check_serving(uri: str, results: dict, tolerance: float) -> str:
    """What is wrong with a model as it is served; "" when it answers the test images as the trained model did."""

    def answer(image: dict) -> str:
        content = Path(results["data"]["folder"], image["file"]).read_bytes()
        (served,) = model.predict([base64.b64encode(content).decode()])
        names = image["probabilities"]
        apart = max(abs(served.probabilities[name] - names[name]) for name in names)
        if apart <= tolerance and (served.label, served.probability) == (
            image["predicted"],
            max(served.probabilities.values()),
        ):
            return ""
        trained = f"trained it says {image['predicted']} {image['probability']:.4f}"
        return f"{trained} of {image['file']}, as it is served {served.label} {served.probability:.4f}"

    try:
        model = tracking.load_model(uri)
        with ThreadPool() as pool:
            return next(filter(None, pool.imap(answer, results["images"])), "")
    except Exception as error:  # whatever the code that serves it raises
        return f"as it is served it fails: {tracking.first_line(error)}"
