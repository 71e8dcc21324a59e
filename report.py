"""What a person looks at after a run: learning curves, confusion matrix, misjudged images, one Markdown report."""

import base64
import math
from collections import Counter
from pathlib import Path

from evaluation import evidence, images_to_settle
from image_classifier import read_image

import numpy as np
from matplotlib.figure import Figure

MISJUDGED_SHOWN = 12  # images
SHOWN_SIZE = 150  # pixels of each of them, both sides
SET_ASIDE_SHOWN = 20  # files
ASSUMED = 0.05  # difference of two accuracies, where the test images show none


def learning_curves(history: list[dict], path: Path) -> Path:
    """Draws loss and accuracy by epoch, for training and validation, into a PNG; `history` has a row an epoch."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        epochs = range(1, len(history) + 1)
        for name, label in ((metric, "train"), (f"val_{metric}", "validation")):
            axes.plot(epochs, [row[name] for row in history], label=label)
        axes.set(xlabel="epoch", ylabel=metric, ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=80)
    return path


def confusion_matrix(results: dict, path: Path) -> Path:
    """Draws how many test images of each class were taken for which, into a PNG."""
    names = results["class_names"]
    counts = np.zeros((len(names), len(names)), int)
    for image in results["images"]:
        if image["predicted"]:  # else the model refused it
            counts[names.index(image["label"]), names.index(image["predicted"])] += 1
    figure = Figure(figsize=(1.8 + 0.9 * len(names), 1.4 + 0.8 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues", vmin=0)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="predicted", ylabel="label")
    axes.set_xticklabels(names, rotation=30, ha="right", parse_math=False)
    axes.set_yticklabels(names, parse_math=False)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, count, ha="center", color="white" if count > counts.max() / 2 else "black")
    figure.savefig(path, dpi=80)
    return path


def misjudged_images(results: dict, path: Path) -> Path:
    """Draws the misjudged test images, the surest mistakes first, into a PNG."""
    wrong = [image for image in results["images"] if image["predicted"] != image["label"]]
    wrong = sorted(wrong, key=lambda image: -image["probability"])[:MISJUDGED_SHOWN]
    columns = min(4, max(1, len(wrong)))
    rows = max(1, math.ceil(len(wrong) / columns))
    figure = Figure(figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    if not wrong:
        figure.text(0.5, 0.5, "none", ha="center")
    for axes, image in zip(figure.axes, wrong, strict=False):
        axes.imshow(read_image(Path(results["data"]["folder"], image["file"]), SHOWN_SIZE))
        axes.set_title(
            f"{image['file']}\n{image['predicted']} {image['probability']:.2f}", fontsize=8, parse_math=False
        )
    figure.savefig(path, dpi=80)
    return path


def comparison(results: dict) -> str:
    """One sentence on how many test images would settle the comparison with the champion; "" without one."""
    if (champion := results["champion"]) is None:
        return ""
    mine, its = (
        [image["predicted"] == image["label"] for image in images] for images in (results["images"], champion["images"])
    )
    pairs, name = Counter(zip(mine, its, strict=True)), f"the champion, version {champion['version']}"
    only_mine, only_its = pairs[True, False] / len(mine), pairs[False, True] / len(mine)
    if only_mine == only_its:
        return (
            f"This model and {name} are right equally often. To show a difference of {ASSUMED:.0%} takes "
            f"{images_to_settle(ASSUMED, 0)} test images or more."
        )
    needed = images_to_settle(max(only_mine, only_its), min(only_mine, only_its))
    told = f"{pairs[True, False]} image(s) only this model has right, {pairs[False, True]} only {name}"
    if needed <= len(mine):
        return f"{told}: that shows which is better (McNemar's test, 95 %)."
    return f"{told}. If it stays like that, {needed} test images show which is better (McNemar's test, 95 %)."


def markdown(results: dict, parameters: dict[str, str], decision: str, folder: Path) -> str:
    """The report of one run, with the pictures from its folder inside."""
    data, names = results["data"], results["class_names"]
    counts = Counter((image["class"], image["split"]) for image in data["images"])
    aside = [image for image in data["images"] if image["reason"]]
    lines = [f"# {decision}", "", evidence(results["images"]), "", comparison(results), ""]
    lines += ["## Test", "", "| class | images | recall |", "|---|---|---|"]
    tested = Counter(image["label"] for image in results["images"])
    lines += [f"| {name} | {tested[name]} | {results['recall'][name]:.2f} |" for name in names]
    lines += ["", f"Test loss {results['test_loss']:.4f}, test accuracy {results['test_accuracy']:.4f}.", ""]
    for name in ("learning_curves", "confusion_matrix", "misjudged_images"):
        picture = folder / f"{name}.png"
        title = name.replace("_", " ").capitalize()
        lines += [
            f"### {title}",
            f"![{title}](data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()})",
            "",
        ]
    lines += ["## Data", "", f"Source: {data['source']}", "", f"Digest: `{data['digest']}`", ""]
    lines += ["| class | train | validation | test | set aside |", "|---|---|---|---|---|"]
    columns = ("train", "validation", "test", None)
    lines += ["| " + " | ".join([name, *(str(counts[name, split]) for split in columns)]) + " |" for name in names]
    if aside:
        lines += ["", "| set aside | reason |", "|---|---|"]
        lines += [f"| {image['file']} | {image['reason']} |" for image in aside[:SET_ASIDE_SHOWN]]
    lines += ["", "## Parameters", "", "| parameter | value |", "|---|---|"]
    names = ("epochs", "batch_size", "learning_rate", "seed", "dropout", "backbone", "filters")
    lines += [f"| {name} | {parameters.get(name, '')} |" for name in names]
    return "\n".join(lines) + "\n"
