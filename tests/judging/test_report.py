"""The report: it answers a person's questions in words, and names come out as they are."""

import html
import re
from pathlib import Path

from workflow.images.findings import find_doubtful_labels
from workflow.judging import evaluation, pictures, report, report_formats
from workflow.records import (
    Bin,
    Calibration,
    CurvePoint,
    DataVersion,
    Decision,
    Evaluation,
    Evidence,
    ImageFile,
    Prediction,
    Results,
)

import pytest
from PIL import Image


def make_results(predictions: list[Prediction], version: str | None = None) -> Results:
    accuracy = evaluation.count_right(predictions) / len(predictions)
    return Results(0.1, accuracy, evaluation.recall(predictions), predictions, version)


@pytest.mark.parametrize(
    ("mine", "its", "told"),
    [
        (
            "rr",
            "rw",
            r"1 image\(s\) are right only with this model, 0 .* version 3\. .* 12 test images show which",
        ),
        ("rw", "wr", r"are right equally often\. To show a difference of 5% takes 114 test images"),
        (
            "wwwwww",
            "rrrrrr",
            r"0 image\(s\) are right only with this model, 6 only with the champion.*: that shows which is better",
        ),
    ],
)
def test_report_says_how_many_images_settle_the_comparison(mine, its, told):
    def results(answers: str) -> Results:
        return make_results([Prediction("", "r", answer, 1.0, {}) for answer in answers], "3")

    assert re.search(told, report.compare(results(mine), results(its)))
    assert report.compare(results(mine), None) == ""


@pytest.mark.parametrize(
    ("accuracies", "told"),
    [
        ((0.8, 0.9, 0.95), r"From 4 to 9 .*, it gained 5 points of accuracy: more photos are likely to help\."),
        ((0.8, 0.9, 0.91), r"From 4 to 9 .*, the accuracy stayed about the same: better photos help"),
        ((0.8, 0.99, 1.0), r"From 4 to 9 .*, hardly an answer was wrong: these photos are too easy"),
        ((0.9,), r"With 9 photos per class to learn from, there are too few to tell"),
    ],
)
def test_learning_curve_is_read_in_a_sentence(accuracies, told):
    counts = (2, 4, 9)[-len(accuracies) :]
    curve = [CurvePoint(count, accuracy, 20) for count, accuracy in zip(counts, accuracies, strict=True)]
    assert re.fullmatch(f"{told}.*", report.advise(make_evidence([], curve)))


def make_evidence(predictions: list[Prediction], curve: list[CurvePoint]) -> Evidence:
    calibration = Calibration(0.05, [Bin(0.9, 1.0, 1.0)])
    recall = evaluation.recall(predictions)
    return Evidence(0.9, 0.1, recall, 0.5, calibration, calibration, curve, predictions)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("crossed", [True, False])
def test_report_holds_every_part_and_names_come_out_as_they_are(tmp_path, right, crossed):
    names = ["a|b $x_1$ <b>`*", "b"]
    files = [f"{names[0]}/one\n$ two.jpeg", "b/3.jpeg"]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    predictions = []
    for file, label in zip(files, names, strict=True):
        predicted = label if right else names[label == names[0]]
        chances = {name: 0.9 if name == predicted else 0.1 for name in names}
        predictions.append(Prediction(file, label, predicted, 0.9, chances, neighbours=[files[0]] * 3))
    images = [ImageFile(file, name, file, split="test") for file, name in zip(files, names, strict=True)]
    images.append(ImageFile("b/broken.jpeg", "b", "x", "not an image: unknown format"))
    data = DataVersion("somewhere", str(tmp_path), images)
    evaluated = Evaluation(
        make_results(predictions), make_results(predictions, "1"), data, find_doubtful_labels(predictions)
    )
    curve = [CurvePoint(count, 0.8 + count / 100, 20) for count in (2, 4, 9)]
    evidence = make_evidence(predictions, curve) if crossed else None
    draw_pictures(tmp_path, predictions, data, evidence)
    decision = Decision(True, "a reason")
    sections = report.build_report("the decision", decision, evaluated, evidence, {"epochs": "2"}, tmp_path)
    page, text = report_formats.to_html("apples", sections), report_formats.to_markdown(sections)
    assert text.startswith("# the decision\n")
    assert page.count("data:image/png;base64,") == text.count("data:image/png;base64,") == 2 + crossed
    assert ("data:image/jpeg;base64," in page) is not right
    said = [
        "of 2 test images are right",
        "95 % confidence",
        "b/broken.jpeg",
        "not an image",
        data.digest,
        names[0],
        "Why: a reason.",
        "In cross-validation" if crossed else "Cross-validation is left out",
        ("Nothing was found: no" if crossed else "nothing else is checked") if right else "2 findings (label: 2)",
    ]
    shown = html.unescape(re.sub("<[^>]+>", " ", page))
    for part in said:
        assert part in shown
        assert " ".join(part.split()) in re.sub(r"\\(.)", r"\1", text)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(re.fullmatch(r"\|( (\\.|[^|\\])* \||---\|)+", line) for line in tables), tables


def draw_pictures(folder: Path, predictions: list[Prediction], data: DataVersion, evidence: Evidence | None) -> None:
    history = [{"loss": loss, "accuracy": 1, "val_loss": loss + 1, "val_accuracy": 0.5} for loss in (1, 0.5)]
    pictures.plot_learning_curves(history, folder / "learning_curves.png")
    pictures.plot_confusion_matrix(predictions, data.class_names, folder / "confusion_matrix.png")
    pictures.plot_misjudged_images(predictions, data, folder / "misjudged_images.png")
    if evidence:
        pictures.plot_evidence(evidence, folder / "evidence_curves.png")


def test_confusion_matrix_of_names_in_letters_without_a_font_is_drawn_without_a_warning(tmp_path):
    names = ["苹果", "橙子"]
    predictions = [Prediction(f"{name}/1", name, name, 1.0, {name: 1.0}) for name in names]
    pictures.plot_confusion_matrix(predictions, names, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 1000


def test_confusion_matrix_of_a_thousand_classes_is_small(tmp_path):
    names = [f"class-{number:03}" for number in range(1000)]
    predictions = [Prediction(f"{name}/1", name, name, 1.0, {name: 1.0}) for name in names]
    pictures.plot_confusion_matrix(predictions, names, tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert max(picture.size) < 5000
