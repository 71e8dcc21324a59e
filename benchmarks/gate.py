"""Measure how often the gate promotes the better model.

    python benchmarks/gate.py --source FOLDER [--tasks "A,B" ...] [--photos 10] [--pairs 200]

For each pair of candidate and champion, sample two folders of photos from a task, which is a set of classes, and
train a model on each. Their true accuracy is measured on the photos in neither folder. Then repeat this with a second
folder that has the photos of the first and as many new ones. Print how often the better model becomes the champion, by
the rule of version 1.0 (accuracy on the test images, then loss) and by the current rules. Finally, repeat the same run,
which should promote nothing.
"""

from pathlib import Path
from typing import Any

from lib.machine import describe_machine
from lib.product import Run, compute_features, to_predictions, train

from workflow.cli import Parser, command_line
from workflow.data.folder import list_images
from workflow.evaluation import comparison, gate
from workflow.files import digest_file
from workflow.model import backbone
from workflow.records import Comparison, Decision, Prediction

import numpy as np

MIN_CLEAR_DIFFERENCE = 0.03  # in true accuracy
MAX_REPEATS = 100  # runs of the same command


def decide_by_version_1(candidate: Run, champion: Run) -> Decision | None:
    """Decide by the test images of the candidate's folder alone."""
    images = [image for image in candidate.data.files if image.split == "test"]
    predictions = (to_predictions(run, images, candidate.test.inputs) for run in (candidate, champion))
    return gate.decide_by_test_images(Comparison("1", *predictions))


def to_compared_model(run: Run) -> comparison.ComparedModel:
    """Return the model of a run as the gate compares it."""

    def predict(photos: list[comparison.ComparedPhoto]) -> list[Prediction]:
        probabilities = run.predict(np.stack([photo.features for photo in photos])).tolist()
        names, rows = run.data.class_names, zip(photos, probabilities, strict=True)
        return [Prediction.from_probabilities(photo.image, names, row, photo.group) for photo, row in rows]

    return comparison.ComparedModel(run.evidence, run.references["features"].astype("float32"), predict)


def decide(candidate: Run, champion: Run, seed: int) -> Decision:
    """Decide as ml_workflow.py does."""
    features = backbone.LENGTH * champion.references["features"].astype("float32")
    references = dict(zip(champion.references["files"].tolist(), features, strict=True))
    photos = comparison.list_photos(candidate.test, champion.evidence, references)
    models = to_compared_model(candidate), to_compared_model(champion)
    compared = comparison.compare_models(photos, *models, "1", seed)
    return gate.decide(compared.candidate, compared, candidate.evidence.unevaluated)


def measure_accuracy(run: Run, features: np.ndarray, labels: np.ndarray) -> float:
    """Return the true accuracy of a run's model on other photos, as the mean recall of the classes."""
    names = np.array(run.data.class_names)
    correct = names[run.predict(features).argmax(axis=1)] == labels
    return float(np.mean([correct[labels == name].mean() for name in names]))


def sample(labels: np.ndarray, photos: int, generator: np.random.Generator, excluded: Any = ()) -> np.ndarray:
    """Return the indices of this many random photos per class, without the excluded ones."""
    allowed = ~np.isin(np.arange(len(labels)), excluded)
    classes = [np.flatnonzero(allowed & (labels == name)) for name in np.unique(labels)]
    return np.concatenate([generator.choice(indices, photos, replace=False) for indices in classes])


Photos = tuple[np.ndarray, np.ndarray, np.ndarray]  # features, labels and digests
Row = tuple[float, Decision, Decision]  # true difference of candidate and champion; decisions of version 1 and now


def train_on(photos: Photos, indices: np.ndarray, **options: Any) -> Run:
    features, labels, digests = photos
    return train(features[indices], labels[indices].tolist(), digests[indices].tolist(), **options)


def compare(photos: Photos, count: int, seed: int, grows: bool) -> Row:
    """Return the difference in true accuracy of a candidate and a champion, and the decisions.

    Args:
        photos: of a task
        count: photos per class in a folder
        seed: for sampling and training
        grows: whether the candidate's folder includes that of the champion
    """
    features, labels, _ = photos
    generator = np.random.default_rng(seed)
    first = sample(labels, count, generator)
    second = sample(labels, count, generator, first if grows else ())
    if grows:
        second = np.concatenate([first, second])
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([first, second]))
    champion, candidate = (train_on(photos, indices, seed=seed) for indices in (first, second))
    accuracies = [measure_accuracy(run, features[rest], labels[rest]) for run in (candidate, champion)]
    decisions = decide_by_version_1(candidate, champion), decide(candidate, champion, seed)
    return accuracies[0] - accuracies[1], *decisions


def describe(rows: list[Row]) -> str:
    """Return how often the better model ends up as champion, by both rules."""
    different = [row for row in rows if row[0]]
    cells = []
    for group in (different, [row for row in different if abs(row[0]) >= MIN_CLEAR_DIFFERENCE]):
        before, now = (np.mean([(row[0] > 0) == row[number].promoted for row in group] or [0]) for number in (1, 2))
        cells.append(f"{len(group):6}{before:9.2f}{now:7.2f}")
    return "  ".join(cells)


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos per class")
    parser.add_argument("--tasks", nargs="+", metavar="A,B", help="class folders, comma-separated (default: all)")
    parser.add_argument("--photos", type=int, default=10, help="per class")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of candidate and champion, in all tasks together")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    classes = list_images(arguments.source)
    files = [file for class_files in classes.values() for file in class_files]
    folders, digests = np.array([file.parent.name for file in files]), np.array([digest_file(file) for file in files])
    photos = compute_features(files), folders, digests
    tasks = [
        tuple(column[np.isin(folders, task.split(","))] for column in photos)
        for task in arguments.tasks or [",".join(classes)]
    ]
    print(f"{arguments.photos} photos per class, {arguments.pairs} pairs; {describe_machine()}")
    print(f"{'':26}{'any difference':>22}  {f'{MIN_CLEAR_DIFFERENCE:.0%} or more':>22}")
    print(f"{'':26}{' pairs   before    now'}  {' pairs   before    now'}")
    for grows, title in ((False, "other photos"), (True, "twice the photos")):
        rows = [
            compare(tasks[number % len(tasks)], arguments.photos, 1 + number // len(tasks), grows)
            for number in range(arguments.pairs)
        ]
        promoted = sum(row[2].promoted for row in rows)
        print(f"{title:26}{describe(rows)}   promoted {promoted} of {len(rows)}", flush=True)
        if grows:
            better = [row for row in rows if row[0] >= MIN_CLEAR_DIFFERENCE]
            promoted = sum(row[2].promoted for row in better)
            print(f"  promoted where it is better by {MIN_CLEAR_DIFFERENCE:.0%} or more: {promoted} of {len(better)}")
    repeats, promoted = min(arguments.pairs, MAX_REPEATS), 0
    for number in range(repeats):
        task = tasks[number % len(tasks)]
        run = train_on(task, sample(task[1], arguments.photos, np.random.default_rng(number)))
        promoted += decide(run, run, 1).promoted
    print(f"the same command again: promoted {promoted} of {repeats} times")


if __name__ == "__main__":
    with command_line("gate.py"):
        main()
