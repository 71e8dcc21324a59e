"""Measure how often a run is correct about its model and its photos.

    python benchmarks/report_accuracy.py --source FOLDER --others FOLDER [--tasks "A,B" ...] [--photos 10] [--seeds 5]

A task is a set of classes. For each seed, sample --photos photos per class, and train a model on them as ml_workflow.py
does. Evaluate it on all other photos of the classes, called the rest. Print

- how often the accuracy on the rest lies in the confidence interval of the cross-validated accuracy,
- the expected calibration error on the rest, before and after calibration,
- the fraction of unknown photos in the rest, and among the photos of other things,
- the fraction of the rest that is not unsure, and the accuracy on it,
- how many photos are reported as mislabeled, although no label was changed, and how many as hard,
- for the first task: how many of 8 changed labels are reported as mislabeled,
- for the first task: the fraction of unknown photos for a model trained on half of its classes, in that half and in the
  other one,
- how many of 20 changed copies (size, compression, a crop of 5%, brightness) are detected as near-duplicates, and how
  many pairs of different photos.
"""

import io
from pathlib import Path

from lib.held_out import split_photos
from lib.machine import describe_machine
from lib.product import Run, train

from workflow.cli import Parser, command_line
from workflow.data import data_issues, near_duplicates
from workflow.data.features import make_thumbnail
from workflow.data.folder import list_images, list_visible
from workflow.evaluation import metrics
from workflow.evaluation.calibration import reliability
from workflow.files import digest_file
from workflow.image_classifier import read_image
from workflow.model import backbone
from workflow.records import MISLABELED

import numpy as np
from PIL import Image, ImageEnhance

CHANGED_LABELS, COPIES = 8, 20


def describe_images(files: list[Path | bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return features and thumbnails of images."""
    pixels = np.stack([read_image(file, backbone.IMAGE_SIZE) for file in files])
    return backbone.compute_features(pixels), np.stack([make_thumbnail(image) for image in pixels])


class Task:
    """The photos of a set of classes."""

    def __init__(self, features: np.ndarray, folders: np.ndarray, digests: np.ndarray, names: list[str]):
        rows = np.isin(folders, names)
        self.features, self.folders, self.digests = features[rows], folders[rows], digests[rows]
        self.labels, self.names = np.unique(self.folders, return_inverse=True)[1], sorted(names)

    def sample(self, photos: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the photos in a folder, and of the rest."""
        ((folder, rest),) = split_photos(self.labels, photos, None, seed)
        return folder, rest

    def train(self, rows: np.ndarray, labels: np.ndarray | None = None) -> Run:
        """Train a model on the photos with these indices, with other labels if they are given."""
        labels = self.folders[rows] if labels is None else labels
        return train(self.features[rows], labels.tolist(), self.digests[rows].tolist())


def count_label_issues(run: Run) -> tuple[int, list[str]]:
    """Return the number of hard photos of a run, and the files of the mislabeled ones."""
    issues = data_issues.find_label_issues(run.collect())
    mislabeled = [issue.file for issue in issues if issue.kind == MISLABELED]
    return len(issues) - len(mislabeled), mislabeled


def evaluate_task(task: Task, others: np.ndarray, arguments) -> dict[str, list[float]]:
    """Return the values of each metric, one per seed."""
    values_by_name: dict[str, list[float]] = {}
    for seed in range(1, arguments.seeds + 1):
        folder, rest = task.sample(arguments.photos, seed)
        run, labels = task.train(folder), task.labels[rest]
        raw, calibrated = run.head(task.features[rest], training=False).numpy(), run.predict(task.features[rest])
        low, high = metrics.confidence_interval(*metrics.count_correct(run.evidence.predictions))
        correct = calibrated.argmax(axis=1) == labels
        sure = calibrated.max(axis=1) >= (run.evidence.unsure_below or 0)
        hard, mislabeled = count_label_issues(run)
        values = {
            "cv": run.evidence.accuracy,
            "rest": correct.mean(),
            "inside": low <= correct.mean() <= high,
            "before": reliability(raw[None], labels).error,
            "after": reliability(calibrated[None], labels).error,
            "own": run.find_unknown(task.features[rest]).mean(),
            "others": run.find_unknown(others).mean(),
            "sure": sure.mean(),
            "sure_correct": correct[sure].mean(),
            "mislabeled": len(mislabeled),
            "hard": hard,
        }
        for name, value in values.items():
            values_by_name.setdefault(name, []).append(float(value))
    return values_by_name


def count_detected_labels(task: Task, arguments) -> tuple[float, float]:
    """Return the mean number of CHANGED_LABELS that are reported as mislabeled, and of other photos."""
    counts = []
    for seed in range(1, arguments.seeds + 1):
        folder, _ = task.sample(arguments.photos, seed)
        generator, labels = np.random.default_rng(seed), task.labels[folder].copy()
        changed = generator.choice(len(labels), CHANGED_LABELS, replace=False)
        labels[changed] = (labels[changed] + generator.integers(1, len(task.names), CHANGED_LABELS)) % len(task.names)
        run = task.train(folder, np.array(task.names)[labels])
        digests = {image.file: image.digest for image in run.data.files}
        _, mislabeled = count_label_issues(run)
        detected = len({digests[file] for file in mislabeled} & set(task.digests[folder][changed].tolist()))
        counts.append((detected, len(mislabeled) - detected))
    return tuple(np.mean(counts, axis=0).tolist())


def evaluate_halves(task: Task, arguments) -> np.ndarray:
    """Return the fractions of unknown photos for a model of half the classes: of these classes, and of the others."""
    fractions = []
    for seed in range(1, arguments.seeds + 1):
        folder, rest = task.sample(arguments.photos, seed)
        half = np.random.default_rng(seed).permutation(len(task.names))[: len(task.names) // 2]
        folder, is_known = folder[np.isin(task.labels[folder], half)], np.isin(task.labels[rest], half)
        run = task.train(folder)
        fractions.append([run.find_unknown(task.features[rest[mask]]).mean() for mask in (is_known, ~is_known)])
    return np.mean(fractions, axis=0)


def change(file: Path, kind: int, generator: np.random.Generator) -> bytes:
    """Return a photo that is changed in one way (kind 0 to 3), or in all (4)."""
    with Image.open(file) as image:
        picture = image.convert("RGB")
    if kind in (1, 4):
        (left, top), (wide, high) = generator.uniform(0, 0.05, 2), picture.size
        picture = picture.crop((int(left * wide), int(top * high), int((left + 0.95) * wide), int((top + 0.95) * high)))
    if kind in (2, 4):
        picture = ImageEnhance.Brightness(picture).enhance(1.15)
    if kind in (3, 4):
        picture = picture.resize((picture.width // 2, picture.height // 2))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=60)
    return content.getvalue()


def count_detected_copies(
    files: list[Path], features: np.ndarray, thumbnails: np.ndarray, seed: int
) -> tuple[int, int]:
    """Return how many of the COPIES are detected, and how many pairs of different photos."""
    generator = np.random.default_rng(seed)
    originals = generator.choice(len(files), COPIES, replace=False)
    copies = describe_images([change(files[index], number % 5, generator) for number, index in enumerate(originals)])
    arrays = [np.concatenate(pair) for pair in zip((features, thumbnails), copies, strict=True)]
    pairs = set(near_duplicates.find_pairs(*arrays))
    expected = {(int(index), len(files) + number) for number, index in enumerate(originals)}
    return len(pairs & expected), len(pairs - expected)


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos per class")
    parser.add_argument("--others", type=Path, required=True, help="a folder of photos of other things")
    parser.add_argument("--tasks", nargs="+", metavar="A,B", help="class folders, comma-separated (default: all)")
    parser.add_argument("--photos", type=int, default=10, help="training photos per class")
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    classes = list_images(arguments.source)
    files = [file for class_files in classes.values() for file in class_files]
    folders = np.array([file.parent.name for file in files])
    features, thumbnails = describe_images(files)
    others, _ = describe_images(list(list_visible(arguments.others)))
    tasks = [task.split(",") for task in arguments.tasks or [",".join(classes)]]
    digests = np.array([digest_file(file) for file in files])
    print(f"{arguments.photos} photos per class, mean of {arguments.seeds} seeds; {describe_machine()}")
    print("           accuracy       truth in   calibration     unknown         not unsure     mislabeled")
    print("classes  cv    rest  interval  before  after    own  others  fraction  correct         hard")
    data = []
    for names in tasks:
        data.append(Task(features, folders, digests, names))
        means = {name: np.mean(values) for name, values in evaluate_task(data[-1], others, arguments).items()}
        inside = f"{means['inside'] * arguments.seeds:.0f} of {arguments.seeds}"
        print(
            f"{len(names):7}{means['cv']:7.3f}{means['rest']:7.3f}{inside:>8}{means['before']:8.3f}{means['after']:7.3f}"
            f"{means['own']:8.3f}{means['others']:7.3f}{means['sure']:9.3f}{means['sure_correct']:9.3f}"
            f"{means['mislabeled']:7.1f}{means['hard']:6.1f}",
            flush=True,
        )
    changed, unchanged = count_detected_labels(data[0], arguments)
    print(f"changed labels reported as mislabeled: {changed:.1f} of {CHANGED_LABELS}, and {unchanged:.1f} other photos")
    trained_rate, other_rate = evaluate_halves(data[0], arguments)
    rates = f"{trained_rate:.3f} of their other photos are unknown, {other_rate:.3f} of other classes'"
    print(f"a model of half of the classes: {rates}")
    counts = [count_detected_copies(files, features, thumbnails, seed) for seed in range(1, arguments.seeds + 1)]
    detected, wrong = map(list, zip(*counts, strict=True))
    print(f"near-duplicates detected, of {COPIES}: {detected}; other pairs: {wrong}")


if __name__ == "__main__":
    with command_line("report_accuracy.py"):
        main()
