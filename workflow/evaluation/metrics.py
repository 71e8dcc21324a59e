"""How good a model is: its predictions for images whose class is known, and what so many images can prove."""

import math
from collections import Counter
from dataclasses import replace

from workflow.data.datasets import ImageDataset
from workflow.errors import WorkflowError
from workflow.files import file_size, group, read_file, sha256
from workflow.model import served_model
from workflow.records import DataVersion, Evidence, ImageFile, Prediction, Results
from workflow.text import locate, printable

from mlflow.pyfunc import PyFuncModel

BATCH = 64  # images that a model is asked about at once,
BATCH_BYTES = 100_000_000  # unless their files are large
MIN_TEST_IMAGES = 100  # below which a result says how few they are
NAMES_SHOWN = 5  # of classes in a sentence
EPSILON = 1e-7  # the lowest probability in a loss, as in Keras


def evaluate(model: PyFuncModel, test: ImageDataset) -> Results:
    """Return a model's results on the files of the test dataset: cross-entropy, accuracy, recall and predictions.

    Raises:
        WorkflowError: a file cannot be read, or has changed
    """
    return summarize(predict_files(model, test.data, test.file_names))


def predict_files(model: PyFuncModel, data: DataVersion, files: list[str]) -> list[Prediction]:
    """Return a model's predictions for image files of a data version, as served.

    Raises:
        WorkflowError: a file cannot be read, or has changed
    """
    images, predictions = {image.file: image for image in data.files}, []
    for batch in group(files, lambda file: file_size(locate(data.folder, file)), BATCH, BATCH_BYTES):
        contents = [read_again(data.folder, images[file]) for file in batch]
        for file, answer in zip(batch, served_model.predict(model, contents), strict=True):
            prediction = to_prediction(file, images[file].class_name, answer)
            digest = images[file].digest
            predictions.append(replace(prediction, digest=digest, group=data.group_of(digest)))
    return predictions


def summarize(predictions: list[Prediction]) -> Results:
    """Return loss, accuracy and recall of these predictions; near-duplicates count once."""
    counted = one_per_group(predictions)
    own = [max(one.probabilities.get(one.class_name, 0), EPSILON) for one in counted]
    accuracy = sum(one.correct for one in counted) / len(counted)
    return Results(-sum(map(math.log, own)) / len(own), accuracy, recall(counted), predictions)


def read_again(folder: str, image: ImageFile) -> bytes:
    """The content of an image file; raises WorkflowError when it is not what the run began with.

    That is no verdict on the model: the run fails, and the next one tries again.
    """
    remedy = "the images have to stay as they are until the run ends; repeat the command"
    try:
        content = read_file(locate(folder, image.file))
    except OSError as error:
        raise WorkflowError(f"{image.file}: {error.strerror or error}; {remedy}") from error
    if sha256(content) != image.digest:
        raise WorkflowError(f"{image.file} has changed since the run began; {remedy}")
    return content


def to_prediction(file: str, label: str, answer: served_model.ServedPrediction | str) -> Prediction:
    """The prediction for an image of the class `label`, from the answer of a model, or its reason for none."""
    if isinstance(answer, str):
        return Prediction(file, label, "", 0.0, {})
    similarity, unknown, nearest, unsure = map(answer.get, ("similarity", "unknown", "nearest", "unsure"))
    prediction = Prediction(file, label, answer["label"], answer["probability"], answer["probabilities"])
    return replace(prediction, similarity=similarity, unknown=unknown, nearest=nearest, unsure=unsure)


def one_per_group(predictions: list[Prediction]) -> list[Prediction]:
    """Return the first prediction of each group of near-duplicates, which prove no more than one of them does."""
    return list({one.group or one.file: one for one in reversed(predictions)}.values())[::-1]


def count_correct(predictions: list[Prediction]) -> tuple[int, int]:
    """Return how many predictions are correct, and how many there are; near-duplicates count once."""
    counted = one_per_group(predictions)
    return sum(one.correct for one in counted), len(counted)


def recall(predictions: list[Prediction]) -> dict[str, float]:
    """Return for each class the fraction of its images that were recognised."""
    total = Counter(one.class_name for one in predictions)
    correct = Counter(one.class_name for one in predictions if one.correct)
    return {name: correct[name] / total[name] for name in sorted(total)}


def confusions(predictions: list[Prediction]) -> list[tuple[str, str, int]]:
    """Which class was taken for which, and how many times; the most frequent first."""
    pairs = Counter((one.class_name, one.predicted) for one in predictions if not one.correct)
    return [(label, predicted, count) for (label, predicted), count in pairs.most_common()]


def interval(correct: float, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Agresti and Coull, Approximate Is Better than "Exact", 1998).

    It is a little wider than Wilson's (1927), with the same centre: the answers of a cross-validation depend on each
    other, and so prove somewhat less than as many independent ones.
    """
    z = 1.96
    more = total + z**2
    centre = (correct + z**2 / 2) / more
    half = z * math.sqrt(centre * (1 - centre) / more)
    return max(0.0, centre - half), min(1.0, centre + half)


def describe_interval(correct: int, total: int) -> str:
    """Return the confidence interval in words, such as 95% confidence interval: 56 to 100%."""
    low, high = interval(correct, total)
    return f"95% confidence interval: {100 * low:.0f} to {100 * high:.0f}%"


def describe_weakest(predictions: list[Prediction]) -> str:
    """Return a sentence on the classes with the lowest recall and what they are taken for; "" without a mistake."""
    counted = one_per_group(predictions)
    mistakes, recalls = confusions(counted), recall(counted)
    if not mistakes:
        return ""
    lowest = min(recalls.values())
    names = [name for name, value in recalls.items() if value == lowest]
    if len(names) > 1:
        listed = ", ".join(map(printable, names[:NAMES_SHOWN])) + (", ..." if len(names) > NAMES_SHOWN else "")
        return f"The weakest classes are {listed}, with a recall of {lowest:.0%} each."
    (name,) = names
    pairs = [(predicted or "nothing", count) for label, predicted, count in mistakes if label == name]
    most = [printable(predicted) for predicted, count in pairs if count == pairs[0][1]]
    others = f"most often taken for {most[0]}" if len(most) == 1 else f"taken for {', '.join(most)} equally often"
    others = f"taken for {most[0]}" if len(pairs) == 1 else others
    of_class = [one for one in counted if one.class_name == name]
    correct = sum(one.correct for one in of_class)
    return (
        f"The weakest class is {printable(name)}, with {correct} of {len(of_class)} correct ({lowest:.0%}): {others}."
    )


def describe_cross_validation(evidence: Evidence) -> str:
    """Return lines on a cross-validation: how good the model is, on new sessions too, and its weakest class."""
    correct, total = count_correct(evidence.predictions)
    photos = f"{correct} of {total} photos"
    if (copies := len(evidence.predictions) - total) > 0:
        photos += f" (not counting {copies} near-duplicates)"
    lines = []
    if evidence.unevaluated:
        names = ", ".join(map(printable, evidence.unevaluated))
        lines.append(
            f"Cross-validation cannot evaluate {names}: a class needs at least three photos that are not "
            "near-duplicates. So the accuracy is unknown. Add photos of other objects, taken on other days."
        )
        if total:
            lines.append(f"In the other classes, {photos} were classified correctly in cross-validation.")
    else:
        lines.append(f"In cross-validation, {photos} were classified correctly ({describe_interval(correct, total)}).")
    if evidence.new_session:
        fraction = evidence.new_session[0] / evidence.new_session[1]
        lines.append(
            f"New photos of the same sessions: {correct / total:.0%} correct; photos of a new session: {fraction:.0%}."
        )
    return "\n".join(filter(None, [*lines, describe_weakest(evidence.predictions)]))


def describe_test(test: list[Prediction], independent: list[Prediction]) -> str:
    """Return a sentence on a test result and what a test set of that size can prove.

    Args:
        test: the predictions for the test images
        independent: predictions for images of which no near-duplicate was trained on; others of `test` do not count
    """
    digests = {one.digest for one in independent}
    correct, total = count_correct([one for one in test if one.digest in digests])
    if not total:
        return "All test images are near-duplicates of training images, so they prove nothing."
    few = f"; only {total} test images" if total < MIN_TEST_IMAGES else ""
    return f"{correct} of {total} test images were classified correctly ({describe_interval(correct, total)}{few})."


def images_to_settle(better: float, worse: float) -> int:
    """How many test images show, with 95 % confidence, that one of two models is right more often than the other.

    `better` and `worse` are the shares of the images that only one of them has right. The test is McNemar's (1947),
    with Edwards' correction (1948).
    """
    z, difference = 1.96, better - worse
    spread = z * math.sqrt(better + worse)
    return math.ceil(((spread + math.sqrt(spread**2 + 4 * difference)) / (2 * difference)) ** 2)
