"""The report: sentences, tables and plots; names are shown unchanged."""

import html
import re
from dataclasses import replace
from pathlib import Path

from workflow.data.data_issues import find_label_issues
from workflow.evaluation import metrics, plots, report, report_formats
from workflow.evaluation.report_formats import Photo
from workflow.records import (
    HARD,
    MISLABELED,
    Bin,
    Calibration,
    CurvePoint,
    DataIssue,
    DataVersion,
    Decision,
    Evaluation,
    Evidence,
    ImageFile,
    Prediction,
)

import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("accuracies", "pattern"),
    [
        ((0.3, 0.6, 0.95), "From 4 to 9 .* rose by 35 .*likely to help"),
        ((0.8, 0.9, 0.95), r"From 4 to 9 .* \+5 .*chance.* 20 photos"),
        ((0.8, 0.99, 1.0), "From 4 to 9 .* too easy"),
        ((0.9,), "9 .* too few"),
        ((), "Unknown"),
    ],
)
def test_advice_follows_from_the_learning_curve(accuracies, pattern):
    counts = (2, 4, 9)[3 - len(accuracies) :]
    curve = [CurvePoint(count, accuracy, 20) for count, accuracy in zip(counts, accuracies, strict=True)]
    assert re.match(pattern, report.advise(make_evidence([], curve)))


def test_flat_learning_curve_advises_better_photos():
    curve = [CurvePoint(count, 0.9, 10_000) for count in (2, 4, 9)]
    assert "better photos" in report.advise(make_evidence([], curve))


def make_evidence(predictions: list[Prediction], curve: list[CurvePoint]) -> Evidence:
    calibration = Calibration(0.05, [Bin(0.9, 1.0, 1.0)])
    recall = metrics.recall(predictions)
    return Evidence(0.9, 0.1, recall, 0.5, calibration, calibration, curve, predictions, unsure_below=0.7)


CURVE = [CurvePoint(count, 0.8 + count / 100, 20) for count in (2, 4, 9)]
NAMES = ["a|b $x_1$ <b>`*", "b"]
FILES = [f"{NAMES[0]}/one\n$ two.jpeg", "b/3.jpeg"]


def make_predictions(correct: bool) -> list[Prediction]:
    """Return a prediction for each of the files."""
    predictions = []
    for file, label in zip(FILES, NAMES, strict=True):
        predicted = label if correct else NAMES[label == NAMES[0]]
        probabilities = {name: 0.95 if name == predicted else 0.05 for name in NAMES}
        one = Prediction(file, label, predicted, 0.95, probabilities, neighbors=[FILES[0]] * 3, digest=f"digest {file}")
        predictions.append(one)
    return predictions


def build(folder: Path, evaluated: Evaluation, evidence: Evidence | None) -> tuple[str, str]:
    """Plot into the folder, and return the report as HTML and as Markdown."""
    plot_all(folder, evaluated.test.predictions, evaluated.data, evidence)
    decision = Decision(True, "a reason")
    sections = report.build_report("the decision", decision, evaluated, evidence, {"epochs": "2"}, folder)
    return report_formats.to_html("apples", sections), report_formats.to_markdown(sections)


@pytest.fixture
def data(tmp_path) -> DataVersion:
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    images = [ImageFile(file, name, f"digest {file}", split="test") for file, name in zip(FILES, NAMES, strict=True)]
    images.append(ImageFile("b/broken.jpeg", "b", "x", "not an image: unknown format"))
    return DataVersion("somewhere", str(tmp_path), images)


@pytest.mark.parametrize(
    ("correct", "with_evidence"), [(True, True), (False, True), (False, False)], ids=["good", "bad", "no backbone"]
)
def test_report_has_every_part_and_shows_names_unchanged(tmp_path, data, correct, with_evidence):
    predictions = make_predictions(correct)
    results = metrics.summarize(predictions)
    evaluated = Evaluation(results, predictions, None, data, find_label_issues(predictions))
    page, text = build(tmp_path, evaluated, make_evidence(predictions, CURVE) if with_evidence else None)
    assert text.startswith("# the decision\n")
    assert page.count("data:image/png;base64,") == text.count("data:image/png;base64,") == 2 + with_evidence
    assert ("data:image/jpeg;base64," in page) is not correct
    expected = ["b/broken.jpeg", "not an image", data.digest, NAMES[0], "a reason", f"{2 * correct} of 2 test photos"]
    expected += [f"{2 * correct} of 2 photos", "below 0.70"] if with_evidence else ["--backbone none"]
    expected += [] if correct else [f"{MISLABELED}: 2"]
    shown = html.unescape(re.sub("<[^>]+>", " ", page))
    for part in expected:
        assert part in shown
        assert " ".join(part.split()) in re.sub(r"\\(.)", r"\1", text)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(re.fullmatch(r"\|( (\\.|[^|\\])* \||---\|)+", line) for line in tables), tables


def test_report_without_evaluated_classes_names_them(tmp_path, data):
    predictions = make_predictions(True)
    evidence = Evidence(recall={"b": 1.0}, predictions=predictions[1:], unevaluated=NAMES[:1])
    evaluated = Evaluation(metrics.summarize(predictions), predictions, None, data, [], NAMES[:1])
    page, _ = build(tmp_path, evaluated, evidence)
    shown = html.unescape(re.sub("<[^>]+>", " ", page))
    assert f"evaluate {NAMES[0]}:" in shown
    assert "temperature 1)" in shown
    assert page.count("data:image/png;base64,") == 2  # no evidence to plot


def test_hard_photos_are_collapsed_and_mislabeled_shown():
    kinds = [MISLABELED, *[HARD] * 2, "format"]
    issues = [DataIssue(kind, f"a/{n}.jpeg", "a", f"detail {n}") for n, kind in enumerate(kinds)]
    summary, shown, hard = report.list_issues(issues, DataVersion("", "", []), with_backbone=True)
    assert f"{MISLABELED}: 1, {HARD}: 2, format: 1" in summary
    assert [row[-1] for row in shown[1:]] == ["detail 0", "detail 3"]
    assert [row[-1] for row in hard.table[1:]] == ["detail 1", "detail 2"]
    sections = [("title", [hard])]
    assert "<details><summary>2 " in report_formats.to_html("title", sections)
    assert "detail 1" not in report_formats.to_markdown(sections)


@pytest.mark.survived("Prefect's UI: tables with photos, and wider than the page")
def test_markdown_has_no_empty_columns_and_no_wide_tables():
    rows = [["photo", "map", "file", "detail"], [Photo(Path("a")), "", "a/1\n.jpeg", "looks like b"]]
    text = report_formats.to_markdown([("title", [rows])])
    assert text.splitlines()[-3:] == ["| file | detail |", "| --- | --- |", "| a/1 .jpeg | looks like b |"]
    rows.append([Photo(Path("b")), "", "x" * report_formats.MAX_TABLE_CHARACTERS, ""])
    text = report_formats.to_markdown([("title", [rows])])
    assert "|" not in text
    assert text.splitlines()[-2:] == ["- a/1 .jpeg · looks like b", f"- {rows[2][2]}"]


def test_issues_without_a_hard_photo_have_one_table():
    blocks = report.list_issues(
        [DataIssue(MISLABELED, "a/1.jpeg", "a", "")], DataVersion("", "", []), with_backbone=True
    )
    assert len(blocks) == 2
    assert len(report.list_issues([], DataVersion("", "", []), with_backbone=True)) == 1


def test_misclassified_image_is_shown_with_activation_map(tmp_path):
    unsure, refused = (replace(prediction, unsure=True) for prediction in make_predictions(False))
    refused = replace(refused, predicted="", unsure=None)
    report.activation_map_path(tmp_path, unsure).write_bytes(b"a picture")
    headings, first, second = report.tabulate_misclassified(
        metrics.summarize([unsure, refused]), DataVersion("", "", []), tmp_path
    )[0]
    assert first[:4] == [
        report_formats.Photo(Path(FILES[0])),
        report_formats.Photo(report.activation_map_path(tmp_path, unsure)),
        FILES[0],
        "b (0.95, unsure)",
    ]
    assert second[1:4] == ["", FILES[1], "none"]
    assert len(headings) == len(first) == 4 + 3


def test_recall_counts_near_duplicates_once():
    predictions = [replace(one, group="one") for one in make_predictions(True)]
    evidence = make_evidence(predictions[:1] * 3, CURVE)
    _, first, second = report.tabulate_recall(NAMES, metrics.summarize(predictions[1:]), evidence)
    assert first == [NAMES[0], "1", "1.00", "", ""]
    assert second == [NAMES[1], "", "", "1", "1.00"]


def plot_all(folder: Path, predictions: list[Prediction], data: DataVersion, evidence: Evidence | None) -> None:
    history = {"loss": [1, 0.5], "accuracy": [1, 1], "val_loss": [2, 1.5], "val_accuracy": [0.5, 0.5]}
    plots.plot_learning_curves(history, folder / "learning_curves.png")
    plots.plot_confusion_matrix(predictions, data.class_names, folder / "confusion_matrix.png")
    plots.plot_misclassified_images(predictions, data, folder / "misclassified_images.png")
    if evidence and evidence.curve:
        plots.plot_evidence(evidence, folder / "evidence_curves.png")


def test_confusion_matrix_is_plotted_without_a_font(tmp_path):
    names = ["苹果", "橙子"]
    predictions = [Prediction(f"{name}/1", name, name, 1.0, {name: 1.0}) for name in names]
    plots.plot_confusion_matrix(predictions, names, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 1000


@pytest.mark.survived("folder: a class name of 255 bytes")
def test_confusion_matrix_has_room_for_long_names(tmp_path):
    names = ["é" * 127, "apples " + "x" * 200]
    predictions = [Prediction("a", name, name, 1.0, {}) for name in names]
    plots.plot_confusion_matrix(predictions, names, tmp_path / "plot.png")  # warnings are errors
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_confusion_matrix_of_a_thousand_classes_is_small(tmp_path):
    names = [f"class-{number:03}" for number in range(1000)]
    predictions = [Prediction(f"{name}/1", name, name, 1.0, {name: 1.0}) for name in names]
    plots.plot_confusion_matrix(predictions, names, tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert max(picture.size) < 5000
