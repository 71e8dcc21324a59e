"""Score a model on photos in folders named after their classes, and compare two models on the same photos."""

import os
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from workflow.errors import WorkflowError
from workflow.evaluation import gate, metrics
from workflow.model.served_model import ServedPrediction
from workflow.records import Comparison, Prediction
from workflow.text import printable, to_class_name

MAX_CONFUSIONS = 10  # pairs of classes printed
MAX_DIFFERENCES = 20  # printed rows: photos on which two models differ


def find_label(image: str, folders: list[tuple[str, ...]], class_names: Collection[str]) -> str:
    """Return the class of an image: the first folder in its path that is named after a class; "" if there is none.

    Only folders inside a scored folder count, and that folder itself, if it is a class folder. `folders` holds the path
    parts of each scored folder.
    """
    path = Path(os.path.abspath(image))
    parents = list(map(to_class_name, path.parts[:-1]))
    composed = {unicodedata.normalize("NFC", name): name for name in class_names}  # earlier releases did not normalize
    start = max((len(parts) for parts in folders if path.parts[: len(parts)] == parts), default=len(parents))
    return next((composed[name] for name in [*parents[start:], parents[start - 1]] if name in composed), "")


class Score(NamedTuple):
    """A model's predictions for images in class folders, and the resulting metrics."""

    uri: str  # of the model
    labeled: list[Prediction]  # one for each image and its copies
    training_groups: Collection[str]  # groups of copies of the images that the model was trained on
    values: dict[str, Any]  # accuracy, recall, confusions and more; printed by --json


def score(
    uri: str,
    predictions: list[ServedPrediction],
    arguments: Sequence[str],
    class_names: Sequence[str],
    training_images: Collection[str],
    copy_of: Mapping[str, str],
) -> Score:
    """Score a model on images in folders named after their class; copies of an image count once.

    Args:
        uri: of the model
        predictions: its predictions, with the `digest` of each readable image
        arguments: the files and folders to score
        class_names: names of the class folders
        training_images: digests of the images that the model was trained on
        copy_of: maps the digest of each copy, for example a smaller one, to that of the image

    Raises:
        WorkflowError: no image is readable, or none is in such a folder
    """
    readable = [item for item in predictions if "error" not in item]
    if not readable:
        raise WorkflowError("--score: no image is readable; see the error for each one")
    copies = label_images(readable, arguments, class_names, copy_of)
    if not copies:
        names = " or ".join(class_names)
        raise WorkflowError(f"--score: no image is in a folder named {names}; rename the folders, or change --model")
    labeled = metrics.one_per_group(copies)
    training_groups = {copy_of.get(digest, digest) for digest in training_images}
    values = {
        "model": uri,
        **(measured := measure(labeled)),
        "training_images": sum(item.group in training_groups for item in labeled),
        "classes_without_images": [name for name in class_names if name not in measured["recall"]],
        "copies": len(copies) - len(labeled),
        "in_other_folders": len(readable) - len(copies),
        "not_readable": len(predictions) - len(readable),
    }
    return Score(uri, labeled, training_groups, values)


def label_images(
    items: list[ServedPrediction], arguments: Sequence[str], class_names: Sequence[str], copy_of: Mapping[str, str]
) -> list[Prediction]:
    """Return the predictions for images in folders named after a class, with this class as their label; see score()."""
    folders = [Path(os.path.abspath(argument)).parts for argument in arguments if os.path.isdir(argument)]
    labels = [find_label(item["image"], folders, class_names) for item in items]
    return [to_prediction(item, label, copy_of) for item, label in zip(items, labels, strict=True) if label]


def to_prediction(item: ServedPrediction, label: str, copy_of: Mapping[str, str]) -> Prediction:
    """Return a served prediction for an image of a known class, in the group of the image that it is a copy of."""
    prediction = metrics.to_prediction(item["image"], label, item)
    return replace(prediction, digest=item["digest"], group=copy_of.get(item["digest"], item["digest"]))


def measure(labeled: list[Prediction]) -> dict[str, Any]:
    """Return the accuracy and other metrics of predictions for images of known classes."""
    correct = sum(item.correct for item in labeled)
    sure = None if labeled[0].unsure is None else [item.correct for item in labeled if not item.unsure]
    return {
        "images": len(labeled),
        "correct": correct,
        "accuracy": correct / len(labeled),
        "interval": metrics.confidence_interval(correct, len(labeled)),
        "sure": None if sure is None else {"images": len(sure), "correct": sum(sure)},
        "recall": metrics.recall(labeled),
        "confusions": [
            {"class": label, "predicted": predicted, "images": count}
            for label, predicted, count in metrics.confusions(labeled)
        ],
        "unknown": sum(bool(item.unknown) for item in labeled),
    }


def describe(scores: dict[str, Any]) -> list[str]:
    """Return the scores of one or two models and their comparison as lines of text; [] for {}."""
    lines = []
    for values in filter(None, [scores.get("score"), scores.get("against")]):
        lines += ["", *([f"{values['model']}:"] if "against" in scores else []), *describe_score(values)]
    if "comparison" in scores:
        lines += ["", *describe_comparison(scores["comparison"])]
    return lines


def describe_score(values: dict[str, Any]) -> list[str]:
    """Return the values of a score as lines of text."""
    correct, images, (low, high) = values["correct"], values["images"], values["interval"]
    interval = f"95% confidence interval: {low:.3f} to {high:.3f}"
    lines = [f"{correct} of {images} images were classified correctly: accuracy {correct / images:.3f} ({interval})."]
    if values["sure"] and (sure := values["sure"]["images"]):
        correct = values["sure"]["correct"]
        lines.append(f"Excluding {images - sure} unsure: {correct} of {sure} correct, accuracy {correct / sure:.3f}.")
    width = max(len(printable(name)) for name in values["recall"])
    lines.append(f"{'class':{width}}  recall")
    lines += [f"{printable(name):{width}}  {recall:.3f}" for name, recall in values["recall"].items()]
    for pair in values["confusions"][:MAX_CONFUSIONS]:
        lines.append(f"{printable(pair['class'])} predicted as {printable(pair['predicted'])}: {pair['images']}")
    for key, text in (
        ("unknown", "unknown: probably none of the classes"),
        ("training_images", "used to train this model, or copies of them: it is probably less accurate on new ones"),
        ("copies", "not counted: copies of others"),
        ("in_other_folders", "not scored: not in a folder named after a class of this model"),
        ("not_readable", "not scored: unreadable"),
    ):
        if values[key]:
            lines.append(f"{values[key]} image(s) {text}.")
    if names := values["classes_without_images"]:
        lines.append(f"No images of {metrics.join_names(names)}: the accuracy covers only the other classes.")
    if "passed" in values:
        verdict = "is at least" if values["passed"] else "is below"
        lines.append(f"The accuracy {verdict} --min-accuracy {values['min_accuracy']}.")
    return lines


def compare(scored: Score, against: Score) -> dict[str, Any]:
    """Compare two models on the images that neither of them was trained on."""
    others = {item.group: item for item in against.labeled}
    pairs = [(item, others[item.group]) for item in scored.labeled if item.group in others]
    training_groups = {*scored.training_groups, *against.training_groups}
    unseen = [pair for pair in pairs if pair[0].group not in training_groups]
    comparison = Comparison(against.uri, [first for first, _ in unseen], [second for _, second in unseen])
    better, worse = gate.count_differences(comparison)
    if unseen:
        conclusion = gate.describe_differences(comparison, scored.uri, against.uri)
    else:
        conclusion = "None of these images is new to both models, so nothing can be concluded; add new images."
    return {
        "images": len(unseen),
        "training_images": len(pairs) - len(unseen),
        "only_model_correct": better,
        "only_against_correct": worse,
        "p": gate.mcnemar(better, worse),
        "conclusion": conclusion,
        "differences": [
            {"image": first.file, "class": first.class_name, "model": first.predicted, "against": second.predicted}
            for first, second in unseen
            if first.predicted != second.predicted
        ],
    }


def describe_comparison(comparison: dict[str, Any]) -> list[str]:
    """Return the result of compare() as lines of text."""
    lines, rows = [], [list(map(printable, row.values())) for row in comparison["differences"]]
    if rows:
        table = [["image", "class", "model", "against"], *rows[:MAX_DIFFERENCES]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
    if len(rows) > MAX_DIFFERENCES:
        lines.append(f"... and {len(rows) - MAX_DIFFERENCES} more; --json lists all")
    if count := comparison["training_images"]:
        lines.append(f"{count} image(s) are not compared: one of the models was trained on them.")
    return [*lines, f"Compared on {comparison['images']} images. {comparison['conclusion']}"]
