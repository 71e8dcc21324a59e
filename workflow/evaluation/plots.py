"""The pictures of a run, as PNG files: learning curves, confusion matrix, misjudged images, evidence."""

import math
import warnings
from contextlib import suppress
from pathlib import Path

from workflow.evaluation import metrics
from workflow.files import read_file
from workflow.image_classifier import read_image
from workflow.records import DataVersion, Evidence, Prediction
from workflow.text import printable

import numpy as np
from matplotlib.figure import Figure

MISJUDGED_SHOWN = 12  # images
SHOWN_SIZE = 150  # pixels of each of them, both sides
CLASSES_SHOWN = 50  # in a confusion matrix with names and numbers; nobody can read more, and they take long to draw


def save(figure: Figure, path: Path) -> None:
    """Writes a figure. A letter that no font here has, such as a Chinese one, is a box; the report's tables have it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=80)


def plot_learning_curves(history: list[dict[str, float]], path: Path) -> Path:
    """Draws loss and accuracy by epoch, for training and validation; `history` has a row per epoch."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        epochs = range(1, len(history) + 1)
        for name, label in ((metric, "train"), (f"val_{metric}", "validation")):
            axes.plot(epochs, [row[name] for row in history], label=label)
        axes.set(xlabel="epoch", ylabel=metric, ylim=(0, None))
        axes.legend()
    save(figure, path)
    return path


def plot_confusion_matrix(predictions: list[Prediction], class_names: list[str], path: Path) -> None:
    """Draws how many test images of each class were taken for which; of many classes without names and numbers."""
    counts = np.zeros((len(class_names), len(class_names)), int)
    for one in predictions:
        if one.predicted:  # else the model refused it
            counts[class_names.index(one.class_name), class_names.index(one.predicted)] += 1
    size = min(len(class_names), CLASSES_SHOWN)
    figure = Figure(figsize=(1.8 + 0.9 * size, 1.4 + 0.8 * size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues", vmin=0)
    axes.set(xticks=[], yticks=[], xlabel="predicted", ylabel="label")
    if len(class_names) <= CLASSES_SHOWN:
        axes.set(xticks=range(size), yticks=range(size))
        axes.set_xticklabels(class_names, rotation=30, ha="right", parse_math=False)
        axes.set_yticklabels(class_names, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, count, ha="center", color="white" if count > counts.max() / 2 else "black")
    save(figure, path)


def plot_misjudged_images(predictions: list[Prediction], data: DataVersion, path: Path) -> bool:
    """Draws the misjudged test images, the surest mistakes first; False, and no picture, when there are none."""
    wrong = sorted((one for one in predictions if not one.correct), key=lambda one: -one.probability)[:MISJUDGED_SHOWN]
    if not wrong:
        return False
    columns = min(4, len(wrong))
    rows = math.ceil(len(wrong) / columns)
    figure = Figure(figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, one in zip(figure.axes, wrong, strict=False):
        with suppress(OSError, ValueError):  # it may have become unreadable since
            axes.imshow(read_image(read_file(data.path_of(one.file)), SHOWN_SIZE))
        axes.set_title(
            f"{printable(one.file)}\n{printable(one.predicted)} {one.probability:.2f}", fontsize=8, parse_math=False
        )
    save(figure, path)
    return True


def plot_evidence(evidence: Evidence, path: Path) -> Path:
    """Draws the accuracy by photos per class, and how often answers of each probability are right."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [point.images_per_class for point in evidence.curve]
    limits = [metrics.interval(point.accuracy * point.images, point.images) for point in evidence.curve]
    low, high = zip(*limits, strict=True)
    left.fill_between(counts, low, high, alpha=0.2)
    left.plot(counts, [point.accuracy for point in evidence.curve], marker="o")
    left.set(xlabel="photos per class to learn from", ylabel="cross-validated accuracy", ylim=(0, 1.02))
    right.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for name, calibration in (("before", evidence.before), ("after", evidence.after)):
        assert calibration is not None  # there is a curve, so there is a calibration
        probabilities = [one.probability for one in calibration.bins]
        right.plot(probabilities, [one.accuracy for one in calibration.bins], marker="o", label=name)
    right.set(xlabel="probability", ylabel="share of right answers", xlim=(0, 1.02), ylim=(0, 1.02))
    right.legend(title="calibration")
    save(figure, path)
    return path
