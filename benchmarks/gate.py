"""Does the gate promote the better model, of runs on folders drawn from photos whose rest is the truth?

    python benchmarks/gate.py --source FOLDER [--tasks "A,B" ...] [--photos 10] [--pairs 200]

For each pair, two folders of so many photos per class are drawn from a task, which is a choice of class folders. The
model of the first is the champion, that of the second the candidate, and their true accuracies are those on all photos
of the task that are in neither folder. Then the second folder has the photos of the first and as many others. It prints
how often the better model ends up as champion, under the rule of version 1.0 (accuracy on the test images, then loss)
and under today's. At last the same run is repeated, which should promote nothing.
"""

from pathlib import Path

from lib.machine import describe_machine
from lib.product import Run, compute_features, to_predictions, train

from workflow.cli import Parser, command_line
from workflow.data.folder import list_images
from workflow.evaluation import comparison, gate
from workflow.files import digest_file
from workflow.model import backbone
from workflow.records import Comparison, Decision, Prediction

import numpy as np

CLEAR = 0.03  # difference of true accuracies


def decide_as_before(candidate: Run, champion: Run) -> Decision:
    """Decide by the test images of the candidate's folder alone: the rule of version 1."""
    images = [image for image in candidate.data.files if image.split == "test"]
    own, others = (to_predictions(run, images, candidate.test.inputs) for run in (candidate, champion))
    return gate.decide_on_test_images(Comparison("1", own, others))


def to_contestant(run: Run) -> comparison.Contestant:
    """Return a run's model as the gate compares it."""

    def ask(photos: list[comparison.Photo]) -> list[Prediction]:
        probabilities = run.predict(np.stack([photo.features for photo in photos]))
        return comparison.to_predictions(photos, probabilities, run.data.class_names)

    return comparison.Contestant(run.evidence, run.references["features"].astype("float32"), ask)


def decide_now(candidate: Run, champion: Run, seed: int) -> Decision:
    """Decide as ml_workflow.py does."""
    references = backbone.LENGTH * champion.references["features"].astype("float32")
    kept = dict(zip(champion.references["files"].tolist(), references, strict=True))
    photos = comparison.list_photos(candidate.test, champion.evidence, kept)
    compared = comparison.pair(photos, to_contestant(candidate), to_contestant(champion), "1", seed)
    return gate.decide(compared.candidate, compared, candidate.evidence.unevaluated)


def measure_accuracy(run: Run, features: np.ndarray, labels: np.ndarray) -> float:
    """Return the true accuracy of a run's model on other photos, the mean of the classes' recalls."""
    names = np.array(run.data.class_names)
    correct = names[run.predict(features).argmax(axis=1)] == labels
    return float(np.mean([correct[labels == name].mean() for name in names]))


def draw(labels: np.ndarray, photos: int, generator: np.random.Generator, within: np.ndarray | None = None):
    """Return the numbers of so many photos per class, drawn from those where `within` is true."""
    within = np.ones(len(labels), bool) if within is None else within
    classes = [np.flatnonzero(within & (labels == name)) for name in np.unique(labels)]
    return np.concatenate([generator.choice(one, photos, replace=False) for one in classes])


def compare(features: np.ndarray, labels: np.ndarray, digests: np.ndarray, photos: int, seed: int, grows: bool):
    """Return the true difference of candidate and champion, and the decisions of before and now."""
    generator = np.random.default_rng(seed)
    first = draw(labels, photos, generator)
    if grows:
        others = np.ones(len(labels), bool)
        others[first] = False
        second = np.concatenate([first, draw(labels, photos, generator, others)])
    else:
        second = draw(labels, photos, generator)
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate([first, second]))
    champion, candidate = (
        train(features[rows], labels[rows].tolist(), digests[rows].tolist(), seed) for rows in (first, second)
    )
    truth = [measure_accuracy(run, features[rest], labels[rest]) for run in (candidate, champion)]
    return truth[0] - truth[1], decide_as_before(candidate, champion), decide_now(candidate, champion, seed)


def describe(rows: list[tuple[float, Decision, Decision]]) -> str:
    """Return how often the better model is the champion in the end, before and now."""
    decided = [row for row in rows if row[0]]
    clear = [row for row in decided if abs(row[0]) >= CLEAR]
    cells = []
    for some in (decided, clear):
        before, now = (np.mean([(row[0] > 0) == row[number].promoted for row in some] or [0]) for number in (1, 2))
        cells.append(f"{len(some):6}{before:9.2f}{now:7.2f}")
    return "  ".join(cells)


def parse_arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos per class")
    parser.add_argument("--tasks", nargs="+", metavar="A,B", help="class folders, with commas; all of them by default")
    parser.add_argument("--photos", type=int, default=10, help="per class")
    parser.add_argument("--pairs", type=int, default=200, help="of candidate and champion, over all tasks")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    classes = list_images(arguments.source)
    files = [file for some in classes.values() for file in some]
    features, folders = compute_features(files), np.array([file.parent.name for file in files])
    digests = np.array([digest_file(file) for file in files])
    tasks = [task.split(",") for task in arguments.tasks or [",".join(classes)]]
    print(f"{arguments.photos} photos per class, {arguments.pairs} pairs; {describe_machine()}")
    print(f"{'':26}{'any difference':>22}  {f'{CLEAR:.0%} or more':>22}")
    print(f"{'':26}{' pairs   before    now'}  {' pairs   before    now'}")
    for grows, title in ((False, "other photos"), (True, "twice the photos")):
        rows = []
        for number in range(arguments.pairs):
            mine = np.isin(folders, tasks[number % len(tasks)])
            rows.append(
                compare(features[mine], folders[mine], digests[mine], arguments.photos, 1 + number // len(tasks), grows)
            )
        print(
            f"{title:26}{describe(rows)}   promoted {sum(now.promoted for _, _, now in rows)} of {len(rows)}",
            flush=True,
        )
        if grows:
            better = [row for row in rows if row[0] >= CLEAR]
            promoted = sum(row[2].promoted for row in better)
            print(f"  promoted where it is better by {CLEAR:.0%} or more: {promoted} of {len(better)}")
    repeats = 0
    for number in range(min(arguments.pairs, 100)):
        mine = np.flatnonzero(np.isin(folders, tasks[number % len(tasks)]))
        rows = mine[draw(folders[mine], arguments.photos, np.random.default_rng(number))]
        run = train(features[rows], folders[rows].tolist(), digests[rows].tolist())
        repeats += decide_now(run, run, 1).promoted
    print(f"the same command again: promoted {repeats} of {min(arguments.pairs, 100)} times")


if __name__ == "__main__":
    with command_line("gate.py"):
        main()
