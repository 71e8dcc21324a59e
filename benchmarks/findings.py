"""Is what a run tells of its model and its photos true?

    python benchmarks/findings.py --source FOLDER --strangers FOLDER [--tasks "A,B" ...] [--photos 10] [--seeds 5]

A task is a choice of class folders. For each seed, so many photos per class are drawn, and a head learns from them; all
other photos of the classes are the truth. It prints

- how often the accuracy on the rest lies in the interval of the cross-validated accuracy,
- the expected calibration error on the rest, before and after the temperature,
- the share of the rest, and of the strangers (photos of other things), that is unknown,
- for the first task: of 8 labels that were changed, how many are among the first 12 doubtful ones,
- for the first task: photos of the other half of its classes that are unknown to a model of one half,
- of 20 photos that were changed (size, compression, a crop of 5 %, brightness), how many are found as near-duplicates,
  and how many pairs of other photos are called so.
"""

import io
import tempfile
from pathlib import Path

from lib.held_out import split_photos
from lib.machine import describe_machine
from lib.variants import fit

import ml_workflow
from workflow.images import findings, near_duplicates
from workflow.images.folder import list_images, list_visible
from workflow.judging import evaluation, evidence
from workflow.model import backbone, references
from workflow.model.image_classifier import read_image
from workflow.records import Evidence
from workflow.running.command_line import Parser, command_line

import numpy as np
from PIL import Image, ImageEnhance

CHANGED, LISTED, COPIED = 8, 12, 20
NAMES = ("epochs", "batch_size", "learning_rate", "dropout")
PARAMETERS = {name: getattr(ml_workflow, name.upper()) for name in NAMES}


def look(files: list[Path | bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Features and thumbnails of images."""
    pixels = np.stack([read_image(file, backbone.IMAGE_SIZE) for file in files])
    return backbone.compute_features(pixels), np.stack([backbone.make_thumbnail(one) for one in pixels])


def assess(features: np.ndarray, labels: np.ndarray, names: list[str], seed: int) -> Evidence:
    files = [str(number) for number in range(len(labels))]
    return evidence.assess(features, labels, files, names, files, seed=seed, **PARAMETERS)


def unknown(features: np.ndarray, labels: np.ndarray, *others: np.ndarray) -> list[float]:
    """The shares of other photos that are unknown to a model of these."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "references.npz")
        limit = references.remember(features, labels, [""] * len(labels), 1, path)
        with np.load(path) as saved:
            known = saved["features"].astype("float32").T
    return [float(((one @ known).max(axis=1) / backbone.LENGTH < limit).mean()) for one in others]


def judge_task(features: np.ndarray, labels: np.ndarray, names: list[str], strangers: np.ndarray, arguments) -> dict:
    """For each figure its value for each seed."""
    figures = {}
    for seed in range(1, arguments.seeds + 1):
        ((learned, rest),) = split_photos(labels, arguments.photos, None, seed)
        found = assess(features[learned], labels[learned], names, seed)
        answers = fit(features[learned], labels[learned], seed)(features[rest], training=False).numpy()
        low, high = evaluation.interval(evaluation.count_right(found.predictions), len(learned))
        truth = float((answers.argmax(axis=1) == labels[rest]).mean())
        softened = evidence.soften(answers, found.temperature)
        errors = [evidence.reliability(one[None], labels[rest]) for one in (answers, softened)]
        shares = unknown(features[learned], labels[learned], features[rest], strangers)
        values = (found.accuracy, truth, low <= truth <= high)
        values += (*(one.error for one in errors), *shares)
        for name, value in zip(("cv", "rest", "inside", "before", "after", "own", "strangers"), values, strict=True):
            figures.setdefault(name, []).append(value)
    return figures


def find_changed_labels(features: np.ndarray, labels: np.ndarray, names: list[str], arguments) -> float:
    """How many of CHANGED wrong labels are among the LISTED first, on average."""
    counts = []
    for seed in range(1, arguments.seeds + 1):
        ((learned, _),) = split_photos(labels, arguments.photos, None, seed)
        draw, mine = np.random.default_rng(seed), labels[learned].copy()
        changed = draw.choice(len(mine), CHANGED, replace=False)
        mine[changed] = (mine[changed] + draw.integers(1, len(names), CHANGED)) % len(names)
        listed = findings.find_doubtful_labels(assess(features[learned], mine, names, seed).predictions)[:LISTED]
        counts.append(len({int(one.file) for one in listed} & set(changed.tolist())))
    return float(np.mean(counts))


def judge_halves(features: np.ndarray, labels: np.ndarray, arguments) -> np.ndarray:
    """The shares of unknown photos, of the own classes and of the other ones, for a model of half of the classes."""
    shares = []
    for seed in range(1, arguments.seeds + 1):
        ((learned, rest),) = split_photos(labels, arguments.photos, None, seed)
        half = np.random.default_rng(seed).permutation(labels.max() + 1)[: (labels.max() + 1) // 2]
        learned, mine = learned[np.isin(labels[learned], half)], np.isin(labels[rest], half)
        ranks = np.unique(labels[learned], return_inverse=True)[1]
        shares.append(unknown(features[learned], ranks, features[rest[mine]], features[rest[~mine]]))
    return np.mean(shares, axis=0)


def change(file: Path, kind: int, draw: np.random.Generator) -> bytes:
    """A photo that was changed in one way, or in all ways at once."""
    with Image.open(file) as image:
        picture = image.convert("RGB")
    if kind in (1, 4):
        (left, top), (wide, high) = draw.uniform(0, 0.05, 2), picture.size
        picture = picture.crop((int(left * wide), int(top * high), int((left + 0.95) * wide), int((top + 0.95) * high)))
    if kind in (2, 4):
        picture = ImageEnhance.Brightness(picture).enhance(1.15)
    if kind in (3, 4):
        picture = picture.resize((picture.width // 2, picture.height // 2))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=60)
    return content.getvalue()


def find_copies(files: list[Path], features: np.ndarray, thumbnails: np.ndarray, seed: int) -> tuple[int, int]:
    """How many of COPIED changed photos are found, and how many pairs of other photos."""
    draw = np.random.default_rng(seed)
    copied = draw.choice(len(files), COPIED, replace=False)
    more = look([change(files[one], number % 5, draw) for number, one in enumerate(copied)])
    together = [np.concatenate(pair) for pair in zip((features, thumbnails), more, strict=True)]
    pairs = set(near_duplicates.find_pairs(*together))
    wanted = {(int(one), len(files) + number) for number, one in enumerate(copied)}
    return len(pairs & wanted), len(pairs - wanted)


def parse_arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos per class")
    parser.add_argument("--strangers", type=Path, required=True, help="a folder of photos of other things")
    parser.add_argument("--tasks", nargs="+", metavar="A,B", help="class folders, with commas; all of them by default")
    parser.add_argument("--photos", type=int, default=10, help="per class, to learn from")
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    classes = list_images(arguments.source)
    files = [file for some in classes.values() for file in some]
    folders = np.array([file.parent.name for file in files])
    features, thumbnails = look(files)
    strangers, _ = look(list_visible(arguments.strangers))
    tasks = [task.split(",") for task in arguments.tasks or [",".join(classes)]]
    print(f"{arguments.photos} photos per class, mean of {arguments.seeds} seeds; {describe_machine()}")
    print("           accuracy          truth in    calibration error    unknown   unknown")
    print("classes  cross-val.   rest   interval    before      after        own  strangers")
    data = []
    for task in tasks:
        mine = np.isin(folders, task)
        data.append((features[mine], np.unique(folders[mine], return_inverse=True)[1], sorted(task)))
        means = {name: np.mean(some) for name, some in judge_task(*data[-1], strangers, arguments).items()}
        inside = f"{means['inside'] * arguments.seeds:.0f} of {arguments.seeds}"
        print(
            f"{len(task):7}{means['cv']:12.3f}{means['rest']:7.3f}{inside:>11}{means['before']:10.3f}"
            f"{means['after']:11.3f}{means['own']:11.3f}{means['strangers']:11.3f}",
            flush=True,
        )
    print(f"changed labels among the first {LISTED}: {find_changed_labels(*data[0], arguments):.1f} of {CHANGED}")
    own, other = judge_halves(*data[0][:2], arguments)
    print(f"a model of half of the classes: {own:.3f} of their other photos are unknown, {other:.3f} of other classes'")
    copies = [find_copies(files, features, thumbnails, seed) for seed in range(1, arguments.seeds + 1)]
    print(
        f"near-duplicates found, of {COPIED}: {[found for found, _ in copies]}; other pairs: {[o for _, o in copies]}"
    )


if __name__ == "__main__":
    with command_line("findings.py"):
        main()
