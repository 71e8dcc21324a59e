"""Plot the learning curves, confusion matrix, misclassified images and cross-validation of a run as PNG files."""

import math
import warnings
from contextlib import chdir, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from workflow.evaluation import metrics
from workflow.files import read_file
from workflow.image_classifier import read_image
from workflow.records import DataVersion, Evidence, Prediction
from workflow.settings import PROJECT
from workflow.text import printable

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES_SHOWN = 12
IMAGE_PIXELS = 150  # width and height
MAX_LABEL_LENGTH = 30  # characters of a class name; Matplotlib warns if a longer one leaves no room for the plot
MAX_LABELED_CLASSES = 50  # the names and counts of a larger confusion matrix would be illegible and slow to draw


def make_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; width and height are in inches."""
    with chdir(PROJECT):  # Matplotlib reads matplotlibrc in this folder
        from matplotlib.figure import Figure  # takes 0.4 s, and predict.py plots nothing

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure. Characters missing from the font become boxes; the report's tables show the names in full."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=80)


def plot_learning_curves(history: dict[str, list[float]], path: Path) -> Path:
    """Plot training and validation loss and accuracy by epoch, from Keras's `history`, and return the path."""
    figure = make_figure(8, 3)
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, label in ((metric, "train"), (f"val_{metric}", "validation")):
            axes.plot(range(1, len(history[name]) + 1), history[name], label=label)
        axes.set(xlabel="epoch", ylabel=metric, ylim=(0, None))
        axes.legend()
    save_figure(figure, path)
    return path


def plot_confusion_matrix(predictions: list[Prediction], class_names: list[str], path: Path) -> None:
    """Plot the number of images by class and predicted class."""
    counts = np.zeros((len(class_names), len(class_names)), int)
    for prediction in predictions:
        if prediction.predicted:  # otherwise the model rejected the image
            counts[class_names.index(prediction.class_name), class_names.index(prediction.predicted)] += 1
    size = min(len(class_names), MAX_LABELED_CLASSES)
    figure = make_figure(1.8 + 0.9 * size, 1.4 + 0.8 * size)
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues", vmin=0)
    axes.set(xticks=[], yticks=[], xlabel="predicted", ylabel="label")
    if len(class_names) <= MAX_LABELED_CLASSES:
        axes.set(xticks=range(size), yticks=range(size))
        names = [name if len(name) <= MAX_LABEL_LENGTH else f"{name[:MAX_LABEL_LENGTH]}..." for name in class_names]
        axes.set_xticklabels(names, rotation=30, ha="right", parse_math=False)
        axes.set_yticklabels(names, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            axes.text(column, row, count, ha="center", color="white" if count > counts.max() / 2 else "black")
    save_figure(figure, path)


def plot_misclassified_images(predictions: list[Prediction], data: DataVersion, path: Path) -> bool:
    """Plot misclassified test images by descending probability; if there are none, write nothing and return False."""
    mistakes = [prediction for prediction in predictions if not prediction.correct]
    if not mistakes:
        return False
    mistakes = sorted(mistakes, key=lambda prediction: -prediction.probability)[:MAX_IMAGES_SHOWN]
    columns = min(4, len(mistakes))
    rows = math.ceil(len(mistakes) / columns)
    figure = make_figure(2.4 * columns, 2.6 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, prediction in zip(figure.axes, mistakes, strict=False):
        with suppress(OSError, ValueError):  # the file may have become unreadable
            axes.imshow(read_image(read_file(data.path_of(prediction.file)), IMAGE_PIXELS))
        title = f"{printable(prediction.file)}\n{printable(prediction.predicted)} {prediction.probability:.2f}"
        axes.set_title(title, fontsize=8, parse_math=False)
    save_figure(figure, path)
    return True


def plot_evidence(evidence: Evidence, path: Path) -> Path:
    """Plot the learning curve (accuracy by number of training photos) and reliability diagram; return the path."""
    figure = make_figure(8, 3)
    left, right = figure.subplots(1, 2)
    counts = [point.images_per_class for point in evidence.curve]
    intervals = [metrics.confidence_interval(point.accuracy * point.images, point.images) for point in evidence.curve]
    low, high = zip(*intervals, strict=True)
    left.fill_between(counts, low, high, alpha=0.2)
    left.plot(counts, [point.accuracy for point in evidence.curve], marker="o")
    left.set(xlabel="training photos per class", ylabel="cross-validated accuracy", ylim=(0, 1.02))
    right.plot([0, 1], [0, 1], color="gray", linewidth=1)
    for name, calibration in (("before", evidence.before), ("after", evidence.after)):
        assert calibration is not None  # evidence with a curve has a calibration
        probabilities = [bin_.probability for bin_ in calibration.bins]
        right.plot(probabilities, [bin_.accuracy for bin_ in calibration.bins], marker="o", label=name)
    right.set(xlabel="probability", ylabel="fraction correct", xlim=(0, 1.02), ylim=(0, 1.02))
    right.legend(title="calibration")
    save_figure(figure, path)
    return path
