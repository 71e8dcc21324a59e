"""What a person looks at after a run: pictures, and one report, as HTML for MLflow and as Markdown for Prefect.

The report has the order of a person's questions: is this the champion, how good is it, what should I fix in my photos,
would more photos help, and then the details. It is built once, as sections of sentences, tables and pictures, and then
written in both languages.
"""

import base64
import html
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from workflow.judging import evaluation
from workflow.judging.evaluation import evidence, images_to_settle
from workflow.model.image_classifier import read_image

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

MISJUDGED_SHOWN = 12  # images
SHOWN_SIZE = 150  # pixels of each of them, both sides
ROWS_SHOWN = 20  # of the tables of files
GAIN = 0.02  # of accuracy by twice the photos, from which on more photos are likely to help
STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; max-width: 60em; margin: 1.5em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 1.8em }
table { border-collapse: collapse; margin: .8em 0 } td, th { padding: .25em .8em .25em 0; text-align: left }
td { border-top: 1px solid #ddd; vertical-align: top; overflow-wrap: break-word }
img { max-width: 100% } td img { width: 110px }
"""
ASSUMED = 0.05  # difference of two accuracies, where the test images show none


@dataclass(frozen=True)
class Photo:
    """A photo of the user's in a table of the report."""

    path: Path


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


def evidence_curves(assessed: dict, path: Path) -> Path:
    """Draws into a PNG the accuracy by photos per class, and how often answers of each probability are right."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts, accuracies, low, high = curve(assessed)
    left.fill_between(counts, low, high, alpha=0.2)
    left.plot(counts, accuracies, marker="o")
    left.set(xlabel="photos per class to learn from", ylabel="cross-validated accuracy", ylim=(0, 1.02))
    right.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for name, result in assessed["calibration"].items():
        bins = result["bins"]
        right.plot(*([one[key] for one in bins] for key in ("probability", "right")), marker="o", label=name)
    right.set(xlabel="probability", ylabel="share of right answers", xlim=(0, 1.02), ylim=(0, 1.02))
    right.legend(title="calibration")
    figure.savefig(path, dpi=80)
    return path


def curve(assessed: dict) -> tuple[list, list, list, list]:
    """The learning curve: photos per class, the accuracy with so many, and the ends of its interval."""
    points = assessed["curve"]
    limits = [evaluation.interval(point["accuracy"] * point["images"], point["images"]) for point in points]
    values = [[point[name] for point in points] for name in ("images_per_class", "accuracy")]
    return *values, [low for low, _ in limits], [high for _, high in limits]


def advise(assessed: dict) -> str:
    """A sentence on whether more photos are likely to help, read off the learning curve."""
    counts, accuracies, *_ = curve(assessed)
    now = round(counts[-1])
    before = [number for number, count in enumerate(counts) if count <= 0.6 * counts[-1]]
    if not before:
        return f"With {now} photos per class to learn from, there are too few to tell whether more would help."
    gain, start = accuracies[-1] - accuracies[before[-1]], round(counts[before[-1]])
    if gain >= GAIN:
        told = f"it gained {100 * gain:.0f} points of accuracy: more photos are likely to help."
    else:
        told = "the accuracy stayed about the same: better photos help more than more photos."
    return f"From {start} to {now} photos per class to learn from, {told}"


def calibrated(assessed: dict) -> str:
    """A sentence on how true the probabilities are."""
    before, after = (assessed["calibration"][name]["expected_calibration_error"] for name in ("before", "after"))
    return (
        f"The probabilities are on average {100 * after:.1f} points away from the share of right answers (expected "
        f"calibration error). Before they were calibrated, with temperature {assessed['temperature']:.2f}, they were "
        f"{100 * before:.1f} points away."
    )


def build(results: dict, assessed: dict | None, parameters: dict[str, str], decision: str, folder: Path) -> list[tuple]:
    """The sections of the report: each has a heading and blocks.

    A block is a sentence, a picture (its path) or a table: a list of rows, the first with the headings. A cell is a
    text or a photo.
    """
    data, photos = results["data"], Path(results["data"]["folder"])
    title, _, reason = decision.partition(": ")
    good = [evidence(results["images"])]
    more = ["Cross-validation is left out with --backbone none: it would take as long as several trainings."]
    if assessed:
        good = [*evaluation.cross_validated(assessed["images"]).split("\n"), *good, calibrated(assessed)]
        more = [advise(assessed), folder / "evidence_curves.png"]
    findings = results["findings"]
    listed = [["photo", "finding", "class", "file", "detail"]]
    listed += [
        [Photo(photos / one["file"]) if one["file"] else "", *(one[name] for name in listed[0][1:])]
        for one in findings[:ROWS_SHOWN]
    ]
    misjudged = [row for row in results["images"] if row["predicted"] != row["label"]]
    why = [["test photo", "file", "answer", "the three training photos that it is nearest to", "", ""]]
    why += [
        [
            *(Photo(photos / row["file"]), row["file"], row["predicted"] or "(refused)"),
            *(Photo(photos / file) for file in row.get("neighbours", [])),
        ]
        for row in misjudged[:ROWS_SHOWN]
    ]
    return [
        (title, list(filter(None, [f"Why: {reason}." if reason else "", comparison(results)]))),
        (
            "How good is it?",
            [*good, recalls(results, assessed), folder / "confusion_matrix.png", *([why] * bool(misjudged))],
        ),
        ("What should I fix in my photos?", [tell_findings(findings), *([listed] * bool(findings))]),
        ("Would more photos help?", more),
        ("Details", details(results, data, parameters, folder)),
    ]


def tell_findings(findings: list[dict]) -> str:
    """A sentence on how many findings there are of each kind."""
    if not findings:
        return "Nothing was found: no doubtful label, no near-duplicates, no photo that is unlike its class."
    counts = Counter(one["finding"] for one in findings)
    told = ", ".join(f"{name}: {count}" for name, count in counts.items())
    return f"{len(findings)} findings ({told}), the most doubtful labels first; none changes a file or stops a run."


def recalls(results: dict, assessed: dict | None) -> list[list[str]]:
    """A table of each class's recall, in cross-validation and in the test."""
    table = [["class", "cross-validated photos", "recall", "test photos", "recall"]]
    for name in results["class_names"]:
        cells = []
        for rows, shares in ((assessed or {}, "recall"), (results, "recall")):
            count = sum(row["label"] == name for row in rows.get("images", []))
            cells += [str(count), f"{rows[shares][name]:.2f}"] if count else ["", ""]
        table.append([name, *cells])
    return table


def details(results: dict, data: dict, parameters: dict[str, str], folder: Path) -> list:
    """The blocks that few people ask for: curves of the training, source, counts, what was set aside, parameters."""
    counts = Counter((image["class"], image["split"]) for image in data["images"])
    aside = [[image["file"], image["reason"]] for image in data["images"] if image["reason"]]
    columns = ("train", "validation", "test", None)
    names = ("epochs", "batch_size", "learning_rate", "seed", "dropout", "backbone", "filters")
    return [
        f"Test loss {results['test_loss']:.4f}, test accuracy {results['test_accuracy']:.4f}.",
        folder / "learning_curves.png",
        f"Source of the photos: {data['source']}. Their digest: {data['digest']}.",
        [
            ["class", "train", "validation", "test", "set aside"],
            *([name, *(str(counts[name, split]) for split in columns)] for name in results["class_names"]),
        ],
        *([[["set aside", "reason"], *aside[:ROWS_SHOWN]]] if aside else []),
        [["parameter", "value"], *([name, parameters.get(name, "")] for name in names)],
    ]


def as_html(title: str, sections: list[tuple]) -> str:
    """The report as one HTML page with all pictures inside."""

    def cell(content, tag: str) -> str:
        if isinstance(content, Photo):
            content = f'<img alt="{html.escape(content.path.name)}" src="{thumbnail(content)}">'
        elif isinstance(content, Path):
            content = f'<img alt="{content.stem}" src="{embed(content)}">'
        else:
            content = html.escape(content)
        return f"<{tag}>{content}</{tag}>"

    def block(content) -> str:
        if not isinstance(content, list):
            return cell(content, "p")
        tags = ["th", *["td"] * (len(content) - 1)]
        rows = ["".join(cell(one, tag) for one in row) for row, tag in zip(content, tags, strict=True)]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    parts = [f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>']
    for number, (heading, blocks) in enumerate(sections):
        parts += [cell(heading, "h2" if number else "h1"), *map(block, blocks)]
    return "\n".join(parts) + "\n"


def as_markdown(sections: list[tuple]) -> str:
    """The report as Markdown, with the pictures inside, but without the photos in tables."""

    def plain(text: str) -> str:
        return re.sub(r"[\\`*_{}\[\]<>#|$~&]", r"\\\g<0>", text)  # Prefect's page shows entities as they are written

    def line(row: list) -> str:
        return "| " + " | ".join(" ".join(plain(one).split()) for one in row) + " |"

    def block(content) -> str:
        if isinstance(content, Path):
            return f"![{content.stem}]({embed(content)})"
        if isinstance(content, str):
            return plain(content)
        rows = [["" if isinstance(one, Photo) else one for one in row] for row in content]
        return "\n".join([line(rows[0]), "|" + "---|" * len(rows[0]), *map(line, rows[1:])])

    parts = []
    for number, (heading, blocks) in enumerate(sections):
        parts += [f"{'##' if number else '#'} {plain(heading)}", *map(block, blocks)]
    return "\n\n".join(parts) + "\n"


def embed(picture: Path) -> str:
    """A picture, which is a PNG, as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def thumbnail(photo: Photo) -> str:
    """A photo, shrunk, as a data URL; an empty one where it cannot be read any more."""
    content = io.BytesIO()
    try:
        Image.fromarray(read_image(photo.path, SHOWN_SIZE)).save(content, "JPEG")
    except (OSError, ValueError):
        return "data:,"
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
