"""The report of a run, in the order of a person's questions.

Is this the champion, how good is it, what should I fix in my photos, would more photos help, and then the details.
report_formats.py says what sections are and writes them as HTML and as Markdown.
"""

from collections import Counter
from pathlib import Path

from workflow.judging import evaluation
from workflow.judging.report_formats import Block, Photo, Section, Table
from workflow.names import locate
from workflow.records import SPLITS, DataVersion, Decision, Evaluation, Evidence, Finding, Results

ROWS_SHOWN = 20  # of the tables of files
GAIN = 0.02  # of accuracy by twice the photos, from which on more photos are likely to help
ASSUMED = 0.05  # difference of two accuracies, where the test images show none
PARAMETERS = ("epochs", "batch_size", "learning_rate", "seed", "dropout", "backbone", "filters")


def build_report(
    title: str,
    decision: Decision,
    evaluated: Evaluation,
    evidence: Evidence | None,
    parameters: dict[str, str],
    pictures: Path,
) -> list[Section]:
    """The sections of the report; `pictures` is the folder with the pictures of the run."""
    candidate, data = evaluated.candidate, evaluated.data
    photos = data.folder
    good: list[Block] = [evaluation.describe_test(candidate.predictions)]
    more: list[Block] = [
        "Cross-validation is left out with --backbone none: it would take as long as several trainings."
    ]
    if evidence:
        cross_validated = evaluation.describe_cross_validation(evidence.predictions).split("\n")
        good = [*cross_validated, *good, describe_calibration(evidence)]
        more = [advise(evidence), pictures / "evidence_curves.png"]
    misjudged = tabulate_misjudged(candidate, photos)
    recall = tabulate_recall(data.class_names, candidate, evidence)
    listed = tabulate_findings(evaluated.findings, photos)
    return [
        (title, list(filter(None, [f"Why: {decision.reason}.", compare(candidate, evaluated.champion)]))),
        (
            "How good is it?",
            [*good, recall, pictures / "confusion_matrix.png", *misjudged],
        ),
        ("What should I fix in my photos?", [describe_findings(evaluated.findings, evidence is not None), *listed]),
        ("Would more photos help?", more),
        ("Details", list_details(candidate, data, parameters, pictures)),
    ]


def compare(candidate: Results, champion: Results | None) -> str:
    """One sentence on how many test images would settle the comparison with the champion; "" without one."""
    if champion is None:
        return ""
    mine, its = ([one.right for one in results.predictions] for results in (candidate, champion))
    pairs, name = Counter(zip(mine, its, strict=True)), f"the champion, version {champion.version}"
    only_mine, only_its = pairs[True, False] / len(mine), pairs[False, True] / len(mine)
    if only_mine == only_its:
        return (
            f"This model and {name} are right equally often. To show a difference of {ASSUMED:.0%} takes "
            f"{evaluation.images_to_settle(ASSUMED, 0)} test images or more."
        )
    needed = evaluation.images_to_settle(max(only_mine, only_its), min(only_mine, only_its))
    told = f"{pairs[True, False]} image(s) are right only with this model, {pairs[False, True]} only with {name}"
    if needed <= len(mine):
        return f"{told}: that shows which is better (McNemar's test, 95 %)."
    return f"{told}. If it stays like that, {needed} test images show which is better (McNemar's test, 95 %)."


def advise(evidence: Evidence) -> str:
    """A sentence on whether more photos are likely to help, read off the learning curve."""
    last = evidence.curve[-1]
    now = round(last.images_per_class)
    before = [point for point in evidence.curve if point.images_per_class <= 0.6 * last.images_per_class]
    if not before:
        return f"With {now} photos per class to learn from, there are too few to tell whether more would help."
    gain, start = last.accuracy - before[-1].accuracy, round(before[-1].images_per_class)
    if before[-1].accuracy > 1 - GAIN:
        told = "hardly an answer was wrong: these photos are too easy to show whether more would help."
    elif gain >= GAIN:
        told = f"it gained {100 * gain:.0f} points of accuracy: more photos are likely to help."
    else:
        told = "the accuracy stayed about the same: better photos help more than more photos."
    return f"From {start} to {now} photos per class to learn from, {told}"


def describe_calibration(evidence: Evidence) -> str:
    """A sentence on how true the probabilities are."""
    return (
        f"The probabilities are on average {100 * evidence.after.error:.1f} points away from the share of right "
        f"answers (expected calibration error). Before they were calibrated, with temperature "
        f"{evidence.temperature:.2f}, they were {100 * evidence.before.error:.1f} points away."
    )


def describe_findings(findings: list[Finding], with_backbone: bool) -> str:
    """A sentence on how many findings there are of each kind."""
    if not findings and not with_backbone:
        return "Nothing was found in the test images; without the backbone, nothing else is checked."
    if not findings:
        return "Nothing was found: no doubtful label, no near-duplicates, no photo that is unlike its class."
    counts = Counter(one.kind for one in findings)
    told = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
    return f"{len(findings)} findings ({told}), the most doubtful labels first; none changes a file or stops a run."


def tabulate_findings(findings: list[Finding], photos: str) -> list[Table]:
    """A table of the findings with their photos; none without findings."""
    rows: Table = [
        [Photo(locate(photos, one.file)) if one.file else "", one.kind, one.class_name, one.file, one.detail]
        for one in findings[:ROWS_SHOWN]
    ]
    return [[["photo", "finding", "class", "file", "detail"], *rows]] if rows else []


def tabulate_misjudged(candidate: Results, photos: str) -> list[Table]:
    """A table of the misjudged test images and the training images that they are nearest to; none without any."""
    misjudged = [one for one in candidate.predictions if not one.right][:ROWS_SHOWN]
    neighbours = max((len(one.neighbours) for one in misjudged), default=0)
    headings: list[str | Photo] = ["test photo", "file", "answer"]
    headings += ["the training photos that it is nearest to", *[""] * (neighbours - 1)] if neighbours else []
    rows: Table = [
        [
            Photo(locate(photos, one.file)),
            one.file,
            one.predicted or "(refused)",
            *(Photo(locate(photos, f)) for f in one.neighbours),
        ]
        for one in misjudged
    ]
    return [[headings, *rows]] if rows else []


def tabulate_recall(class_names: list[str], candidate: Results, evidence: Evidence | None) -> Table:
    """A table of the recall of each class, in cross-validation and in the test."""
    table: Table = [["class", "cross-validated photos", "recall", "test photos", "recall"]]
    for name in class_names:
        cells: list[str | Photo] = []
        for found in (evidence, candidate):
            count = sum(one.class_name == name for one in found.predictions) if found else 0
            cells += [str(count), f"{found.recall[name]:.2f}"] if found and count else ["", ""]
        table.append([name, *cells])
    return table


def list_details(candidate: Results, data: DataVersion, parameters: dict[str, str], pictures: Path) -> list[Block]:
    """The blocks that few people ask for: curves of the training, source, counts, what was set aside, parameters."""
    counts = Counter((image.class_name, image.split) for image in data.files)
    aside: Table = [[image.file, image.reason] for image in data.files if image.reason]
    splits: Table = [[name, *(str(counts[name, split]) for split in (*SPLITS, None))] for name in data.class_names]
    values: Table = [[name, parameters.get(name, "")] for name in PARAMETERS]
    set_aside: list[Block] = [[["set aside", "reason"], *aside[:ROWS_SHOWN]]] if aside else []
    return [
        f"Test loss {candidate.loss:.4f}, test accuracy {candidate.accuracy:.4f}.",
        pictures / "learning_curves.png",
        f"Source of the photos: {data.source}. Their digest: {data.digest}.",
        [["class", *SPLITS, "set aside"], *splits],
        *set_aside,
        [["parameter", "value"], *values],
    ]
