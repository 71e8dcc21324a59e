"""The report of a run.

It answers, in order: Is the model the champion, and why? How good is it? What should be fixed in the photos? Would more
photos help? build_report() lists these sections. To add a metric, add a block to describe_quality(); report_formats.py
renders all blocks as HTML and Markdown.
"""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from workflow.evaluation import gate, metrics, plots
from workflow.evaluation.report_formats import Block, Collapsed, Photo, Section, Table
from workflow.files import write_whole
from workflow.model import activation_maps
from workflow.records import (
    HARD,
    SPLITS,
    Artifact,
    DataIssue,
    DataVersion,
    Decision,
    Evaluation,
    Evidence,
    Prediction,
    Results,
)

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel  # which imports pandas


MAX_ROWS = 20  # per table of files
MIN_GAIN = 0.02  # in accuracy with about twice as many photos; with a smaller gain, more photos hardly help
MAX_EARLIER_FRACTION = 0.6  # the last point is compared with one that has at most this fraction of its photos


def build_report(
    summary: str,
    decision: Decision,
    evaluated: Evaluation,
    evidence: Evidence | None,
    parameters: dict[str, str],
    folder: Path,
) -> list[Section]:
    """Return the sections of the report.

    Args:
        summary: the registered version and whether it was promoted, a colon, and the reason
        decision: the gate's decision
        evaluated: output of evaluate_model
        evidence: results of the cross-validation; None without a backbone
        parameters: parameters of the MLflow run
        folder: the run's scratch folder, which contains its plots and activation maps
    """
    reasons: list[Block] = [f"Why: {decision.reason}."]
    if (compared := evaluated.comparison) and compared.candidate:
        reasons.append(gate.describe_differences(compared, "this model", f"the champion (version {compared.version})"))
    return [
        (summary.partition(": ")[0], reasons),
        ("How good is it?", describe_quality(evaluated, evidence, folder)),
        (
            "What should I fix in my photos?",
            list_issues(evaluated.issues, evaluated.data, evidence is not None),
        ),
        ("Would more photos help?", describe_learning_curve(evidence, folder)),
        ("Details", list_details(evaluated.test, evaluated.data, parameters, folder)),
    ]


def describe_quality(evaluated: Evaluation, evidence: Evidence | None, folder: Path) -> list[Block]:
    """Return the blocks about the metrics of the model. Add new metrics here."""
    results, data = evaluated.test, evaluated.data
    blocks: list[Block] = [metrics.describe_test(results.predictions, evaluated.candidate)]
    if evidence:
        blocks = [*metrics.describe_cross_validation(evidence).split("\n"), *blocks]
        blocks += [*filter(None, [describe_unsure(evidence)]), describe_calibration(evidence)]
        blocks.append(
            "The registered model was trained on the training and validation photos, because more photos improve it."
        )
    blocks += [tabulate_recall(data.class_names, results, evidence), folder / Artifact.CONFUSION_MATRIX]
    return blocks + tabulate_misclassified(results, data, folder)


def describe_unsure(evidence: Evidence) -> str:
    """Return a sentence about the probability below which a prediction is unsure."""
    if evidence.accuracy is None:
        return ""
    if evidence.unsure_below is None:
        return "No prediction is marked unsure: no threshold leaves at least ten predictions of which 95% are correct."
    return (
        f"Predictions with a probability below {evidence.unsure_below:.2f} are marked unsure; at least 95% of the "
        "others were correct in cross-validation."
    )


def describe_calibration(evidence: Evidence) -> str:
    """Return a sentence about the expected calibration error."""
    if evidence.before is None or evidence.after is None:
        return "The probabilities are not calibrated (temperature 1): a class has too few independent photos."
    before, after = 100 * evidence.before.error, 100 * evidence.after.error
    return (
        f"Expected calibration error: {after:.1f} percentage points, {before:.1f} before temperature scaling "
        f"(temperature {evidence.temperature:.2f})."
    )


def tabulate_recall(class_names: list[str], results: Results, evidence: Evidence | None) -> Table:
    """Return a table of the recall of each class, in cross-validation and on the test images."""
    table: Table = [["class", "cross-validated photos", "recall", "test photos", "recall"]]
    for name in class_names:
        cells: list[str | Photo] = []
        for source in (evidence, results):
            counted = metrics.one_per_group(source.predictions) if source else []
            count = sum(prediction.class_name == name for prediction in counted)
            cells += [str(count), f"{source.recall[name]:.2f}"] if source and count else ["", ""]
        table.append([name, *cells])
    return table


def tabulate_misclassified(results: Results, data: DataVersion, folder: Path) -> list[Block]:
    """Return a table of the misclassified test images with activation maps and nearest training images; [] if none.

    Args:
        results: results on the test images
        data: data version with the image files
        folder: contains the activation maps that explain_mistakes() wrote
    """
    mistakes = results.mistakes[:MAX_ROWS]
    neighbors = max((len(prediction.neighbors) for prediction in mistakes), default=0)
    headings: list[str | Photo] = ["test photo", "activation map", "file", "prediction"]
    headings += ["nearest training photos", *[""] * (neighbors - 1)] if neighbors else []
    rows: Table = []
    for prediction in mistakes:
        path, unsure = activation_map_path(folder, prediction), ", unsure" if prediction.unsure else ""
        label = f"{prediction.predicted} ({prediction.probability:.2f}{unsure})" if prediction.predicted else "none"
        row = [Photo(data.path_of(prediction.file)), Photo(path) if path.exists() else "", prediction.file, label]
        rows.append(row + [Photo(data.path_of(file)) for file in prediction.neighbors])
    return [[headings, *rows]] if rows else []


def explain_mistakes(model: "PyFuncModel", results: Results, data: DataVersion, folder: Path) -> None:
    """Write the activation maps of the misclassified test images to the folder; none without a backbone."""
    classifier = model.unwrap_python_model()
    if not activation_maps.is_explainable(classifier):
        return
    for prediction in results.mistakes[:MAX_ROWS]:
        with suppress(OSError):  # the file may have become unreadable
            (overlay,) = activation_maps.explain_images(classifier, [data.read(prediction.file)])
            if isinstance(overlay, bytes):
                write_whole(activation_map_path(folder, prediction), overlay)


def activation_map_path(folder: Path, prediction: Prediction) -> Path:
    return folder / f"explained-{prediction.digest[:16]}.jpeg"


def list_issues(issues: list[DataIssue], data: DataVersion, with_backbone: bool) -> list[Block]:
    """Return the blocks about data issues: counts by kind, and tables of photos, collapsed for hard photos."""
    if not issues and not with_backbone:
        return ["No issues in the test photos, and no copies. Without the backbone, nothing else is checked."]
    if not issues:
        return ["No issues: no mislabeled photos, near-duplicates or outliers."]
    counts = Counter(issue.kind for issue in issues)
    listed = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
    hard = tabulate_issues([issue for issue in issues if issue.kind == HARD], data)
    summary = f"{counts[HARD]} misclassified photo(s) that are hard rather than mislabeled"
    return [
        f"Issues: {listed}. They are only reported; the files are not changed.",
        *tabulate_issues([issue for issue in issues if issue.kind != HARD], data),
        *(Collapsed(summary, table) for table in hard),
    ]


def tabulate_issues(issues: list[DataIssue], data: DataVersion) -> list[Table]:
    """Return a table of the issues with their photos; [] without issues."""
    rows: Table = [
        [
            Photo(data.path_of(issue.file)) if issue.file else "",
            issue.kind,
            issue.class_name,
            issue.file,
            issue.detail,
        ]
        for issue in issues[:MAX_ROWS]
    ]
    return [[["photo", "issue", "class", "file", "detail"], *rows]] if rows else []


def describe_learning_curve(evidence: Evidence | None, folder: Path) -> list[Block]:
    """Return the blocks about whether more photos are likely to help."""
    if evidence is None:
        return ["With --backbone none, there is no cross-validation, because training is too slow to repeat."]
    if not evidence.curve:
        return [advise(evidence)]
    return [advise(evidence), plots.plot_evidence(evidence, folder / Artifact.EVIDENCE_CURVES)]


def advise(evidence: Evidence) -> str:
    """Return a sentence about whether more photos are likely to help, from the slope of the learning curve."""
    if not evidence.curve:
        return "Unknown: the accuracy cannot be measured without more photos that are not near-duplicates."
    last = evidence.curve[-1]
    count, max_earlier = round(last.images_per_class), MAX_EARLIER_FRACTION * last.images_per_class
    earlier = [point for point in evidence.curve if point.images_per_class <= max_earlier]
    if not earlier:
        return f"{count} training photos per class are too few to tell whether more would help."
    first = earlier[-1]
    gain = last.accuracy - first.accuracy
    error = metrics.Z_95 * sum(point.accuracy * (1 - point.accuracy) / point.images for point in (first, last)) ** 0.5
    if first.accuracy > 1 - MIN_GAIN:
        result = (
            "nearly every prediction was already correct: these photos are too easy to show whether more would help."
        )
    elif gain >= max(MIN_GAIN, error):
        result = f"the accuracy rose by {100 * gain:.0f} percentage points: more photos are likely to help."
    elif gain + error < MIN_GAIN:
        result = "the accuracy hardly changed: better photos would help more than additional ones."
    else:
        result = (
            f"the accuracy changed by {100 * gain:+.0f} percentage points, which may be due to chance: {last.images} "
            "photos are too few to tell whether more would help."
        )
    return f"From {round(first.images_per_class)} to {count} training photos per class, {result}"


def list_details(results: Results, data: DataVersion, parameters: dict[str, str], folder: Path) -> list[Block]:
    """Return the blocks with the training curves, source, image counts, skipped files and parameters."""
    counts = Counter((image.class_name, image.split) for image in data.files)
    splits: Table = [[name, *(str(counts[name, split]) for split in (*SPLITS, None))] for name in data.class_names]
    values: Table = [[name, value] for name, value in parameters.items()]
    skipped: Table = [[image.file, image.reason] for image in data.files if image.reason]
    skipped_table: list[Block] = [[["skipped file", "reason"], *skipped[:MAX_ROWS]]] if skipped else []
    return [
        f"Test loss {results.loss:.4f}, test accuracy {results.accuracy:.4f}.",
        folder / Artifact.LEARNING_CURVES,
        f"Source of the photos: {data.source}. Data digest: {data.digest}.",
        [["class", *SPLITS, "skipped"], *splits],
        *skipped_table,
        [["parameter", "value"], *values],
    ]
