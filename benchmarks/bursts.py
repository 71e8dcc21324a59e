"""Measure what a run reports on folders of copies and bursts.

    python benchmarks/bursts.py --source FOLDER [--classes A,B] [--photos 10] [--seeds 3]

A burst consists of slightly cropped, brightened and recompressed variants of one photo. Make folders of bursts from
photos of two classes, and run the pipeline's preparation, near-duplicate detection, split, cross-validation and refit
on each. Compare the reported accuracy with that on all other photos, and print how many of these are unknown.
"""

import io
import tempfile
from pathlib import Path

from lib.machine import describe_machine
from lib.product import compute_features, train

from workflow.cli import Parser, command_line
from workflow.data.folder import check_classes, digest_files, list_images, mark_duplicates
from workflow.data.prepare import prepare_features
from workflow.errors import WorkflowError
from workflow.evaluation import metrics
from workflow.orchestration import cluster

import numpy as np
from PIL import Image, ImageEnhance

VARIANTS = 8  # photos in a burst
MAX_CHANGE = 0.03  # fraction of a side that is cropped, and of the brightness


def vary(file: Path, generator: np.random.Generator) -> bytes:
    """Return a variant of a photo: slightly cropped, brightened and recompressed."""
    with Image.open(file) as image:
        picture = image.convert("RGB")
    width, height = picture.size
    left, top, right, bottom = generator.uniform(0, MAX_CHANGE, 4)
    picture = picture.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))
    picture = ImageEnhance.Brightness(picture).enhance(1 + generator.uniform(-MAX_CHANGE, MAX_CHANGE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=int(generator.integers(80, 95)))
    return content.getvalue()


def write_class(folder: Path, files: list[Path], copies: int, generator: np.random.Generator) -> None:
    """Write each photo, and its variants, into a class folder."""
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        (folder / f"{number}.jpeg").write_bytes(file.read_bytes())
        for copy in range(copies):
            (folder / f"{number}-{copy}.jpeg").write_bytes(vary(file, generator))


Counts = tuple[tuple[int, int], tuple[int, int]]  # photos, and additional variants of each, for both classes


def list_cases(photos: int) -> dict[str, Counts]:
    """Return the contents of the folders by name."""
    return {
        "different photos": ((photos, 0), (photos, 0)),
        "each photo twice": ((photos, 1), (photos, 1)),
        "one class is a burst": ((1, VARIANTS - 1), (2 * photos, 0)),
        "one class is two bursts": ((2, VARIANTS - 1), (2 * photos, 0)),
        "both classes are bursts": ((1, VARIANTS - 1), (1, VARIANTS - 1)),
        "three groups per class": ((3, 3), (3, 3)),
        "a burst and others": ((photos, 0), (photos, 0)),
        "one photo per class, repeated": ((1, 0), (1, 0)),
    }


def make_folder(
    case: str, counts: Counts, folder: Path, sampled: list[list[Path]], generator: np.random.Generator
) -> None:
    """Write the folder of a case."""
    for name, files, (photos, copies) in zip(("one", "other"), sampled, counts, strict=True):
        write_class(folder / name, files[:photos], copies, generator)
        if case == "a burst and others":
            for copy in range(VARIANTS):
                (folder / name / f"burst-{copy}.jpeg").write_bytes(vary(files[0], generator))
        if case == "one photo per class, repeated":
            for copy in range(VARIANTS):
                (folder / name / f"same-{copy}.jpeg").write_bytes(files[0].read_bytes())


def describe(folder: Path, cache: Path, rest: list[np.ndarray]) -> str:
    """Return a row with what a run reports on a folder, and the results on the rest."""
    images = mark_duplicates(digest_files(folder, cache))
    prepared = prepare_features(images, folder, cache, cluster.workers(None), lambda done, total: None)
    usable = [image for image in prepared.images if not image.reason]
    try:
        check_classes(prepared.images)
    except WorkflowError as error:
        return f"refused: {str(error)[:60]}"
    features = np.stack([prepared.inputs[image.digest] for image in usable])
    names, digests = [image.class_name for image in usable], [image.digest for image in usable]
    run = train(features, names, digests, duplicate_of=prepared.duplicate_of)
    correct, total = metrics.count_correct(run.evidence.predictions)
    headline = (
        "unevaluated: " + ", ".join(run.evidence.unevaluated) if run.evidence.unevaluated else f"{correct} of {total}"
    )
    accuracy = np.mean([(run.predict(features).argmax(axis=1) == label).mean() for label, features in enumerate(rest)])
    unknown = "-"
    if not np.isnan(run.references["max_novelty"]):
        unknown = f"{np.mean([run.find_unknown(features).mean() for features in rest]):.2f}"
    return f"{len(usable):6}  {headline:24}{run.evidence.temperature:6.2f}{unknown:>11}{accuracy:9.3f}"


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos per class")
    parser.add_argument("--classes", metavar="A,B", help="two class folders (default: the first two)")
    parser.add_argument("--photos", type=int, default=10, help="different photos per class")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    classes = list_images(arguments.source)
    names = arguments.classes.split(",") if arguments.classes else list(classes)[:2]
    print(f"{', '.join(names)}, {arguments.photos} photos per class; {describe_machine()}")
    print(f"{'':31}{'photos':>6}  {'cross-validation':24}{'temp.':>6}{'unknown':>11}{'accuracy':>9}")

    def measure(case: str, counts: Counts, seed: int) -> str:
        generator = np.random.default_rng(seed)
        sampled = [generator.permutation(np.array(classes[name], object)).tolist() for name in names]
        rest = [compute_features(files[2 * arguments.photos :]) for files in sampled]
        with tempfile.TemporaryDirectory() as root:
            make_folder(case, counts, Path(root, "folder"), sampled, generator)
            return describe(Path(root, "folder"), Path(root, "cache"), rest)

    for case, counts in list_cases(arguments.photos).items():
        for seed in range(1, arguments.seeds + 1):
            print(f"{case if seed == 1 else '':31}{measure(case, counts, seed)}", flush=True)


if __name__ == "__main__":
    with command_line("bursts.py"):
        main()
