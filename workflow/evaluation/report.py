"""The report of a run, in the order of a person's questions.

Is this the champion, how good is it, what should I fix in my photos, would more photos help, and then the details.
report_formats.py says what sections are and writes them as HTML and as Markdown.
"""

from collections import Counter
from pathlib import Path

from workflow.evaluation import gate, metrics
from workflow.evaluation.report_formats import Block, Collapsed, Photo, Section, Table
from workflow.files import write_whole
from workflow.model import activation_maps
from workflow.records import (
    HARD,
    SPLITS,
    Comparison,
    DataIssue,
    DataVersion,
    Decision,
    Evaluation,
    Evidence,
    Prediction,
    Results,
)

from mlflow.pyfunc import PyFuncModel

ROWS_SHOWN = 20  # of the tables of files
GAIN = 0.02  # of accuracy by twice the photos, from which on more photos are likely to help
Z = 1.96  # standard errors, beyond which a difference is not chance (95%)
ASSUMED_DIFFERENCE = 0.05  # difference of two accuracies, where the photos show none
REFIT = (
    "The registered model was trained on the training and validation images together, because a model learns most from "
    "all images that the test does not need."
)
PARAMETERS = ("epochs", "batch_size", "learning_rate", "seed", "dropout", "backbone", "filters", "refit")


def build_report(
    title: str,
    decision: Decision,
    evaluated: Evaluation,
    evidence: Evidence | None,
    parameters: dict[str, str],
    pictures: Path,
) -> list[Section]:
    """Return the sections of the report; `pictures` is the folder with the pictures of the run."""
    results, data = evaluated.test, evaluated.data
    test = metrics.describe_test(results.predictions, evaluated.candidate)
    good: list[Block] = [test]
    more: list[Block] = [
        "There is no cross-validation with --backbone none: it would take as long as several trainings."
    ]
    if evidence:
        good = [*metrics.describe_cross_validation(evidence).split("\n"), test]
        good += [*filter(None, [describe_unsure(evidence)]), describe_calibration(evidence), REFIT]
        more = [advise(evidence), *([pictures / "evidence_curves.png"] if evidence.curve else [])]
    return [
        (title, list(filter(None, [f"Why: {decision.reason}.", describe_comparison(evaluated.comparison)]))),
        (
            "How good is it?",
            [
                *good,
                tabulate_recall(data.class_names, results, evidence),
                pictures / "confusion_matrix.png",
                *tabulate_misjudged(results, data, pictures),
            ],
        ),
        (
            "What should I fix in my photos?",
            list_issues(evaluated.issues, data, evidence is not None),
        ),
        ("Would more photos help?", more),
        ("Details", list_details(results, data, parameters, pictures)),
    ]


def describe_comparison(comparison: Comparison | None) -> str:
    """Return a sentence on how many photos would settle the comparison with the champion; "" without one."""
    if comparison is None or not comparison.candidate:
        return ""
    better, worse = gate.count_differences(comparison)
    total, champion = len(comparison.candidate), f"the champion, version {comparison.version}"
    if better == worse:
        return (
            f"This model and {champion} are correct on equally many photos. Showing a difference of "
            f"{ASSUMED_DIFFERENCE:.0%} takes at least {metrics.images_to_settle(ASSUMED_DIFFERENCE, 0)} photos."
        )
    result = f"Only this model is correct on {better} photo(s), only {champion} on {worse}"
    if gate.mcnemar(better, worse) < gate.ALPHA:
        return f"{result}: that shows which is better."
    needed = metrics.images_to_settle(max(better, worse) / total, min(better, worse) / total)
    return f"{result}. If the proportions stay the same, {needed} photos show which is better."


def describe_unsure(evidence: Evidence) -> str:
    """Return a sentence on the probability below which a prediction is unsure."""
    if evidence.accuracy is None:
        return ""
    if evidence.unsure_below is None:
        return "No prediction is marked unsure: no limit leaves ten predictions of which 95% are correct."
    return (
        f"A prediction with a probability below {evidence.unsure_below:.2f} is unsure: at least 95% of the others were "
        "correct in cross-validation."
    )


def advise(evidence: Evidence) -> str:
    """Return a sentence on whether more photos are likely to help, read off the learning curve."""
    if not evidence.curve:
        return "Unknown: more photos that are not near-duplicates are needed before anything can be measured."
    last = evidence.curve[-1]
    now = round(last.images_per_class)
    before = [point for point in evidence.curve if point.images_per_class <= 0.6 * last.images_per_class]
    if not before:
        return f"{now} training photos per class are too few to say whether more would help."
    first = before[-1]
    gain, start = last.accuracy - first.accuracy, round(first.images_per_class)
    error = Z * sum(point.accuracy * (1 - point.accuracy) / point.images for point in (first, last)) ** 0.5
    if first.accuracy > 1 - GAIN:
        result = (
            "nearly every prediction was already correct: these photos are too easy to show whether more would help."
        )
    elif gain >= max(GAIN, error):
        result = f"the accuracy rose by {100 * gain:.0f} points: more photos are likely to help."
    elif gain + error < GAIN:
        result = "the accuracy stayed about the same: better photos help more than more photos."
    else:
        result = (
            f"the accuracy changed by {100 * gain:+.0f} points, which may be chance: {last.images} photos cannot show "
            "whether more would help."
        )
    return f"From {start} to {now} training photos per class, {result}"


def describe_calibration(evidence: Evidence) -> str:
    """Return a sentence on how far the probabilities are from the fraction of correct predictions."""
    if evidence.before is None or evidence.after is None:
        return "The probabilities are not calibrated (temperature 1): a class has too few independent photos."
    before, after = 100 * evidence.before.error, 100 * evidence.after.error
    return (
        f"Expected calibration error: {after:.1f} points; {before:.1f} before calibration with temperature "
        f"{evidence.temperature:.2f}."
    )


def list_issues(issues: list[DataIssue], data: DataVersion, with_backbone: bool) -> list[Block]:
    """Return the blocks on data issues: how many of each kind, and the photos; hard photos are collapsed."""
    if not issues and not with_backbone:
        return ["No issue in the test images; without the backbone, nothing else is checked."]
    if not issues:
        return ["No issues: no mislabeled photos, near-duplicates or outliers."]
    counts = Counter(one.kind for one in issues)
    listed = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
    shown = [one for one in issues if one.kind != HARD]
    hard = tabulate_issues([one for one in issues if one.kind == HARD], data)
    summary = f"{counts[HARD]} misclassified photo(s) that are hard rather than mislabeled"
    return [
        f"Issues: {listed}. They never change a file or stop a run.",
        *tabulate_issues(shown, data),
        *(Collapsed(summary, table) for table in hard),
    ]


def tabulate_issues(issues: list[DataIssue], data: DataVersion) -> list[Table]:
    """Return a table of the issues with their photos; none without issues."""
    rows: Table = [
        [Photo(data.path_of(one.file)) if one.file else "", one.kind, one.class_name, one.file, one.detail]
        for one in issues[:ROWS_SHOWN]
    ]
    return [[["photo", "issue", "class", "file", "detail"], *rows]] if rows else []


def explain_mistakes(model: PyFuncModel, results: Results, data: DataVersion, pictures: Path) -> None:
    """Write an activation map over each misclassified test image into `pictures`; none without a backbone."""
    classifier = model.unwrap_python_model()
    if not activation_maps.is_explainable(classifier):
        return
    mistakes = [one for one in results.predictions if not one.correct][:ROWS_SHOWN]
    paths = [data.path_of(one.file) for one in mistakes]
    for one, content in zip(mistakes, activation_maps.explain_photos(classifier, paths), strict=True):
        if content is not None:
            write_whole(explanation(pictures, one), content)


def explanation(pictures: Path, prediction: Prediction) -> Path:
    """Return the path of the activation map of an image."""
    return pictures / f"explained-{prediction.digest[:16]}.jpeg"


def tabulate_misjudged(results: Results, data: DataVersion, pictures: Path) -> list[Block]:
    """Return a table of the misjudged test images with their activation maps and nearest training images, if any."""
    misjudged = [one for one in results.predictions if not one.correct][:ROWS_SHOWN]
    neighbors = max((len(one.neighbors) for one in misjudged), default=0)
    headings: list[str | Photo] = ["test photo", "what the model looked at", "file", "prediction"]
    headings += ["nearest training photos", *[""] * (neighbors - 1)] if neighbors else []
    rows: Table = []
    for one in misjudged:
        path = explanation(pictures, one)
        label = (
            f"{one.predicted} ({one.probability:.2f}{', unsure' if one.unsure else ''})" if one.predicted else "none"
        )
        row = [Photo(data.path_of(one.file)), Photo(path) if path.exists() else "", one.file, label]
        rows.append(row + [Photo(data.path_of(file)) for file in one.neighbors])
    return [[headings, *rows]] if rows else []


def tabulate_recall(class_names: list[str], results: Results, evidence: Evidence | None) -> Table:
    """A table of the recall of each class, in cross-validation and in the test."""
    table: Table = [["class", "cross-validated photos", "recall", "test photos", "recall"]]
    for name in class_names:
        cells: list[str | Photo] = []
        for found in (evidence, results):
            count = sum(one.class_name == name for one in metrics.one_per_group(found.predictions)) if found else 0
            cells += [str(count), f"{found.recall[name]:.2f}"] if found and count else ["", ""]
        table.append([name, *cells])
    return table


def list_details(results: Results, data: DataVersion, parameters: dict[str, str], pictures: Path) -> list[Block]:
    """The blocks that few people ask for: curves of the training, source, counts, what was set aside, parameters."""
    counts = Counter((image.class_name, image.split) for image in data.files)
    aside: Table = [[image.file, image.reason] for image in data.files if image.reason]
    splits: Table = [[name, *(str(counts[name, split]) for split in (*SPLITS, None))] for name in data.class_names]
    values: Table = [[name, parameters.get(name, "")] for name in PARAMETERS]
    set_aside: list[Block] = [[["set aside", "reason"], *aside[:ROWS_SHOWN]]] if aside else []
    return [
        f"Test loss {results.loss:.4f}, test accuracy {results.accuracy:.4f}.",
        pictures / "learning_curves.png",
        f"Source of the photos: {data.source}. Their digest: {data.digest}.",
        [["class", *SPLITS, "set aside"], *splits],
        *set_aside,
        [["parameter", "value"], *values],
    ]
