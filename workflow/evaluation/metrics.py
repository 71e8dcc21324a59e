"""Compute a model's metrics on labeled images and their uncertainty, and describe them in sentences."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workflow.errors import WorkflowError
from workflow.files import file_size, group, sha256
from workflow.model import served_model
from workflow.records import DataVersion, Evidence, Prediction, Results
from workflow.text import printable

import numpy as np

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel  # which imports pandas

MAX_BATCH_IMAGES = 64  # images predicted at once
MAX_BATCH_BYTES = 100_000_000  # size of the image files predicted at once
MIN_TEST_IMAGES = 100  # the report warns if there are fewer
MAX_NAMES_SHOWN = 5  # classes in a sentence
MAX_NAME_LENGTH = 200  # MLflow accepts 250 characters, including prefix and suffix
EPSILON = 1e-7  # probabilities are clipped to at least this for the loss, as in Keras
Z_95 = 1.96  # half-width of a 95% confidence interval, in standard errors


def predict_files(model: "PyFuncModel", data: DataVersion, files: list[str]) -> list[Prediction]:
    """Return the predictions of a model's serving code for image files of a data version.

    Raises:
        WorkflowError: a file cannot be read, or has changed since the run began
    """
    predictions = []
    for batch in group(files, lambda file: file_size(data.path_of(file)), MAX_BATCH_IMAGES, MAX_BATCH_BYTES):
        contents = [read_unchanged(data, file) for file in batch]
        for file, output in zip(batch, served_model.predict(model, contents), strict=True):
            image = data.by_file[file]
            prediction = to_prediction(file, image.class_name, output)
            predictions.append(replace(prediction, digest=image.digest, group=data.group_of(image.digest)))
    return predictions


def summarize(predictions: list[Prediction]) -> Results:
    """Return the loss, accuracy and recall of predictions; near-duplicates count once."""
    counted = one_per_group(predictions)
    loss = cross_entropy([prediction.probabilities.get(prediction.class_name, 0) for prediction in counted])
    accuracy = sum(prediction.correct for prediction in counted) / len(counted)
    return Results(loss, accuracy, recall(counted), predictions)


def cross_entropy(probabilities: Sequence[float] | np.ndarray) -> float:
    """Return the mean cross-entropy, given the predicted probabilities of the true classes, in any shape."""
    return float(-np.log(np.maximum(probabilities, EPSILON)).mean()) + 0.0  # not -0.0


def check_convergence(history: dict[str, list[float]]) -> None:
    """Raise WorkflowError if a loss is not finite, given the metrics by epoch from Keras."""
    if not np.isfinite([history["loss"], history["val_loss"]]).all():
        raise WorkflowError("training diverged: the loss is not finite; choose a smaller --learning-rate")


def check_saturation(predictions: list[Prediction]) -> None:
    """Raise WorkflowError if all probabilities are exactly 1, because they then say nothing about confidence."""
    if all(prediction.probability == 1 for prediction in predictions):
        raise WorkflowError(
            "training is saturated: the probability of every prediction is exactly 1; choose a smaller --learning-rate "
            "or fewer --epochs"
        )


def read_unchanged(data: DataVersion, file: str) -> bytes:
    """Return the content of an image file; raise WorkflowError if it cannot be read or has changed."""
    try:
        return data.read(file)
    except OSError as error:
        remedy = "do not change the images during a run; repeat the command"
        raise WorkflowError(f"{file}: {error.strerror or error}; {remedy}") from error


def to_prediction(file: str, label: str, output: served_model.ServedPrediction | str) -> Prediction:
    """Convert the output of a model, or its error message, to the prediction for an image of class `label`."""
    if isinstance(output, str):
        return Prediction(file, label, "", 0.0, {})
    optional: dict[str, Any] = {name: output.get(name) for name in ("similarity", "unknown", "nearest", "unsure")}
    return Prediction(file, label, output["label"], output["probability"], output["probabilities"], **optional)


def one_per_group(predictions: list[Prediction]) -> list[Prediction]:
    """Return the first prediction of each near-duplicate group."""
    first: dict[str, Prediction] = {}
    for prediction in predictions:
        first.setdefault(prediction.group or prediction.file, prediction)
    return list(first.values())


def count_correct(predictions: list[Prediction]) -> tuple[int, int]:
    """Return the number of correct predictions and the total; near-duplicates count once."""
    counted = one_per_group(predictions)
    return sum(prediction.correct for prediction in counted), len(counted)


def recall(predictions: list[Prediction]) -> dict[str, float]:
    """Return the recall by class: the fraction of its images that are predicted correctly."""
    total = Counter(prediction.class_name for prediction in predictions)
    correct = Counter(prediction.class_name for prediction in predictions if prediction.correct)
    return {name: correct[name] / total[name] for name in sorted(total)}


def confusions(predictions: list[Prediction]) -> list[tuple[str, str, int]]:
    """Return each pair of a class and an incorrectly predicted class with its count, the most frequent first."""
    mistakes = [prediction for prediction in predictions if not prediction.correct]
    pairs = Counter((prediction.class_name, prediction.predicted) for prediction in mistakes)
    return [(label, predicted, count) for (label, predicted), count in pairs.most_common()]


def confidence_interval(correct: float, total: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a proportion (Agresti and Coull, 1998).

    It has the same center as Wilson's interval (1927) and is slightly wider, which suits cross-validation, whose
    predictions are not independent.
    """
    count = total + Z_95**2
    center = (correct + Z_95**2 / 2) / count
    half = Z_95 * math.sqrt(center * (1 - center) / count)
    return max(0.0, center - half), min(1.0, center + half)


def describe_duplicates(predictions: list[Prediction]) -> str:
    """Return how many near-duplicates count_correct() ignores, in parentheses; "" if there are none."""
    duplicates = len(predictions) - len(one_per_group(predictions))
    return f" (not counting {duplicates} near-duplicates)" if duplicates else ""


def describe_interval(correct: int, total: int) -> str:
    """Return the confidence interval as text, such as "95% confidence interval: 56-100%"."""
    low, high = confidence_interval(correct, total)
    return f"95% confidence interval: {100 * low:.0f}-{100 * high:.0f}%"


def describe_weakest(predictions: list[Prediction]) -> str:
    """Return a sentence about the classes with the lowest recall and their confusions; "" without mistakes."""
    counted = one_per_group(predictions)
    recalls = recall(counted)
    if all(prediction.correct for prediction in counted):
        return ""
    lowest = min(recalls.values())
    names = [name for name, value in recalls.items() if value == lowest]
    if len(names) > 1:
        return f"The weakest classes are {join_names(names)}, with a recall of {lowest:.0%} each."
    of_class = [prediction for prediction in counted if prediction.class_name == names[0]]
    correct, total = count_correct(of_class)
    mistakes = join_names([f"{predicted or 'nothing'} ({count})" for _, predicted, count in confusions(of_class)])
    return f"The weakest class is {join_names(names)} ({correct} of {total} correct), mistaken for {mistakes}."


def join_names(names: Sequence[str]) -> str:
    """Return the first MAX_NAMES_SHOWN names as printable text."""
    return ", ".join([*map(printable, names[:MAX_NAMES_SHOWN]), *(["..."] if len(names) > MAX_NAMES_SHOWN else [])])


def describe_cross_validation(evidence: Evidence) -> str:
    """Return lines of text with the cross-validated accuracy, the accuracy on new sessions, and the weakest class."""
    correct, total = count_correct(evidence.predictions)
    photos = f"{correct} of {total} photos{describe_duplicates(evidence.predictions)}"
    lines = []
    if evidence.unevaluated:
        names = join_names(evidence.unevaluated)
        lines.append(
            f"The accuracy is unknown, because cross-validation cannot evaluate {names}: a class needs at least three "
            "photos that are not near-duplicates. Add photos of different objects, taken on different days."
        )
        if total:
            lines.append(f"In the other classes, {photos} were classified correctly in cross-validation.")
    else:
        lines.append(f"In cross-validation, {photos} were classified correctly ({describe_interval(correct, total)}).")
    if evidence.new_session:
        fraction = evidence.new_session[0] / evidence.new_session[1]
        same_sessions = f"Accuracy on new photos from the same sessions: {correct / total:.0%}"
        lines.append(f"{same_sessions}; on photos from a new session: {fraction:.0%}.")
    return "\n".join(filter(None, [*lines, describe_weakest(evidence.predictions)]))


def describe_test(test: list[Prediction], independent: list[Prediction]) -> str:
    """Return a sentence with the accuracy on the test images and its uncertainty.

    Only images in `independent` count: those without near-duplicates in the training images.
    """
    digests = {prediction.digest for prediction in independent}
    counted = [prediction for prediction in test if prediction.digest in digests]
    correct, total = count_correct(counted)
    if not total:
        return "All test photos are near-duplicates of training photos, so they say nothing about the accuracy."
    note = f"; only {total} test photos" if total < MIN_TEST_IMAGES else ""
    photos = f"{correct} of {total} test photos{describe_duplicates(counted)}"
    return f"{photos} were classified correctly ({describe_interval(correct, total)}{note})."


def required_images(better: float, worse: float) -> int:
    """Return the number of images needed to show, with 95% confidence, which of two models is more accurate.

    `better` and `worse` are the fractions of images that only the better model, or only the worse one, classifies
    correctly. The test is McNemar's (1947), with Edwards' correction (1948).
    """
    spread, difference = Z_95 * math.sqrt(better + worse), better - worse
    return math.ceil(((spread + math.sqrt(spread**2 + 4 * difference)) / (2 * difference)) ** 2)


def replace_forbidden(name: str) -> str:
    """Replace each character that MLflow forbids in names of metrics and models with an underscore."""
    return re.sub(r"[^\w .-]", "_", name)


def metric_name(class_name: str) -> str:
    """Convert a class name to a unique name that MLflow accepts as part of a metric's name."""
    name = replace_forbidden(class_name)[:MAX_NAME_LENGTH]
    return name if name == class_name else f"{name}-{sha256(class_name)[:8]}"
