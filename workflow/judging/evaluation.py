"""What a model is worth: its answers to images whose class is known, and what so many images can prove.

An answered image is a row, a dictionary: its file, label (its class), predicted (the answer), probability,
probabilities, and whatever else the model says. A model that refuses an image has predicted "".
"""

import math
from collections import Counter
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.model import served_model

import mlflow

BATCH = 64  # images that a model is asked about at once
LEAST = 1e-7  # probability, as Keras takes it in a loss


def judge(model: mlflow.pyfunc.PyFuncModel, test) -> dict:
    """A model's results on the files of the test dataset: cross-entropy, accuracy, recall per class, and its answers.

    Raises WorkflowError when a file cannot be read.
    """
    folder, rows = Path(test.data["folder"]), []
    classes = {image["file"]: image["class"] for image in test.data["images"]}
    for start in range(0, len(test.file_names), BATCH):
        files = test.file_names[start : start + BATCH]
        try:
            contents = [served_model.read_file(folder / file) for file in files]
        except OSError as error:
            reason = error.strerror or str(error)
            raise WorkflowError(f"{error.filename}: {reason}; the test images have to stay where they are") from error
        for file, answer in zip(files, served_model.ask(model, contents), strict=True):
            rows.append(answered(file, classes[file], answer))
    loss = -sum(math.log(max(row["probabilities"].get(row["label"], 0), LEAST)) for row in rows) / len(rows)
    return {"test_loss": loss, "test_accuracy": count_right(rows) / len(rows), "recall": recall(rows), "images": rows}


def answered(file: str, label: str, answer: dict | str) -> dict:
    """The row of an image, from its class and what a model said of it."""
    refused = {"label": "", "probability": 0.0, "probabilities": {}}
    answer = refused if isinstance(answer, str) else answer
    told = {"predicted": answer["label"], **{name: answer[name] for name in answer if name != "label"}}
    return {"file": file, "label": label} | told


def count_right(rows: list[dict]) -> int:
    return sum(row["predicted"] == row["label"] for row in rows)


def recall(rows: list[dict]) -> dict[str, float]:
    """For each class the share of its images that were recognised."""
    all_of = Counter(row["label"] for row in rows)
    right = Counter(row["label"] for row in rows if row["predicted"] == row["label"])
    return {name: right[name] / all_of[name] for name in sorted(all_of)}


def confusions(rows: list[dict]) -> list[tuple[str, str, int]]:
    """Which class was taken for which, and how many times; the most frequent first."""
    pairs = Counter((row["label"], row["predicted"]) for row in rows if row["predicted"] != row["label"])
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


def weakest(rows: list[dict]) -> str:
    """A sentence on the class with the lowest recall, and what it is taken for; "" when all images are right."""
    taken = confusions(rows)
    if not taken:
        return ""
    name, share = min(recall(rows).items(), key=lambda one: one[1])
    right, total = count_right([row for row in rows if row["label"] == name]), sum(row["label"] == name for row in rows)
    other = next(predicted for label, predicted, _ in taken if label == name) or "nothing"
    return (
        f"The weakest class is {name}: {right} of {total} are right ({share:.0%}), the others mostly taken for {other}."
    )


def cross_validated(rows: list[dict]) -> str:
    """Two lines on a result of cross-validation: how good the model is, and its weakest class if it is ever wrong."""
    right, total = count_right(rows), len(rows)
    low, high = interval(right, total)
    told = (
        f"In cross-validation {right} of {total} photos were right: the accuracy on such photos is between {low:.0%} "
        f"and {high:.0%} (95 % confidence)."
    )
    return f"{told}\n{weakest(rows)}".rstrip()


def evidence(rows: list[dict]) -> str:
    """One or two sentences on a test result, and what a test set of that size can prove."""
    right, total = count_right(rows), len(rows)
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
