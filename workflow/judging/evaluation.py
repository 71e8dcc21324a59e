"""How good a model is: its predictions for images whose class is known, and what so many images can prove."""

import math
from collections import Counter

from workflow.errors import WorkflowError
from workflow.files import file_size, group, read_file, sha256
from workflow.images.datasets import ImageDataset
from workflow.model import served_model
from workflow.names import locate, printable
from workflow.records import ImageFile, Prediction, Results

from mlflow.pyfunc import PyFuncModel

BATCH = 64  # images that a model is asked about at once,
BATCH_BYTES = 100_000_000  # unless their files are large
LEAST = 1e-7  # probability, as Keras takes it in a loss


def evaluate(model: PyFuncModel, test: ImageDataset, version: str | None = None) -> Results:
    """A model's results on the files of the test dataset: cross-entropy, accuracy, recall per class, predictions.

    Raises WorkflowError when a file cannot be read, or has changed.
    """
    predictions = []
    known = {image.file: image for image in test.data.files}
    for files in group(test.file_names, lambda file: file_size(locate(test.data.folder, file)), BATCH, BATCH_BYTES):
        contents = [read_again(test.data.folder, known[file]) for file in files]
        for file, answer in zip(files, served_model.ask(model, contents), strict=True):
            predictions.append(to_prediction(file, known[file].class_name, answer))
    loss = -sum(math.log(max(one.probabilities.get(one.class_name, 0), LEAST)) for one in predictions) / len(
        predictions
    )
    return Results(loss, count_right(predictions) / len(predictions), recall(predictions), predictions, version)


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


def to_prediction(file: str, label: str, answer: served_model.Answer | str) -> Prediction:
    """The prediction for an image of the class `label`, from the answer of a model, or its reason for none."""
    if isinstance(answer, str):
        return Prediction(file, label, "", 0.0, {})
    similarity, unknown, nearest = map(answer.get, ("similarity", "unknown", "nearest"))  # an older model has none
    told = answer["label"], answer["probability"], answer["probabilities"]
    return Prediction(file, label, *told, similarity, unknown, nearest)


def count_right(predictions: list[Prediction]) -> int:
    return sum(one.right for one in predictions)


def recall(predictions: list[Prediction]) -> dict[str, float]:
    """For each class the share of its images that were recognised."""
    all_of = Counter(one.class_name for one in predictions)
    right = Counter(one.class_name for one in predictions if one.right)
    return {name: right[name] / all_of[name] for name in sorted(all_of)}


def confusions(predictions: list[Prediction]) -> list[tuple[str, str, int]]:
    """Which class was taken for which, and how many times; the most frequent first."""
    pairs = Counter((one.class_name, one.predicted) for one in predictions if not one.right)
    return [(label, predicted, count) for (label, predicted), count in pairs.most_common()]


def interval(right: float, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Agresti and Coull, Approximate Is Better than "Exact", 1998).

    It is a little wider than Wilson's (1927), with the same centre: the answers of a cross-validation depend on each
    other, and so prove somewhat less than as many independent ones.
    """
    z = 1.96
    more = total + z**2
    centre = (right + z**2 / 2) / more
    half = z * math.sqrt(centre * (1 - centre) / more)
    return max(0.0, centre - half), min(1.0, centre + half)


def describe_weakest(predictions: list[Prediction]) -> str:
    """A sentence on the class with the lowest recall, and what it is taken for; "" when all images are right."""
    taken = confusions(predictions)
    if not taken:
        return ""
    name, share = min(recall(predictions).items(), key=lambda pair: pair[1])
    of_class = [one for one in predictions if one.class_name == name]
    other = next(predicted for label, predicted, _ in taken if label == name) or "nothing"
    return (
        f"The weakest class is {printable(name)}: {count_right(of_class)} of {len(of_class)} are right ({share:.0%}). "
        f"It is most often taken for {printable(other)}."
    )


def describe_cross_validation(predictions: list[Prediction]) -> str:
    """Two lines on a result of cross-validation: how good the model is, and its weakest class if it is ever wrong."""
    right, total = count_right(predictions), len(predictions)
    low, high = interval(right, total)
    told = (
        f"In cross-validation {right} of {total} photos were right: the accuracy on such photos is between {low:.0%} "
        f"and {high:.0%} (95 % confidence)."
    )
    return f"{told}\n{describe_weakest(predictions)}".rstrip()


def describe_test(predictions: list[Prediction]) -> str:
    """Two sentences on a test result: the result, and what a test set of that size can prove."""
    right, total = count_right(predictions), len(predictions)
    low, high = interval(right, total)
    few = "So few images only show" if total < 100 else "That shows"
    return (
        f"{right} of {total} test images are right. "
        f"{few} that the accuracy is between {low:.0%} and {high:.0%} (95 % confidence)."
    )


def images_to_settle(better: float, worse: float) -> int:
    """How many test images show, with 95 % confidence, that one of two models is right more often than the other.

    `better` and `worse` are the shares of the images that only one of them has right. The test is McNemar's (1947),
    with Edwards' correction (1948).
    """
    z, difference = 1.96, better - worse
    spread = z * math.sqrt(better + worse)
    return math.ceil(((spread + math.sqrt(spread**2 + 4 * difference)) / (2 * difference)) ** 2)
