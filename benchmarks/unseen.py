"""Which model is correct on photos that it has not seen, from a run on a folder of ten photos per class?

    python benchmarks/unseen.py --source FOLDER [--tasks "A,B" "C,D,E" ...] [--photos 10] [--folds N] [--only NAME ...]
                                [--seeds 5] [--picture FILE]

A task is a choice of class folders. For each seed, a folder of so many photos per class is drawn. As in a run, its test
images are withheld from the model, which is trained on the others. All photos that are not in the folder judge it, by
its balanced accuracy, the mean of the recalls of the classes. Where a class has no others, the photos are
cross-validated instead: five models are trained, and each photo is judged by the one that has not seen it. Each variant
differs from the default in one thing. MLflow keeps a parent run with one child run per variant.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lib.held_out import split_photos
from lib.machine import describe_machine
from lib.product import split_by_product
from lib.variants import CUTS, SIZES, VARIANTS, look_with

from workflow.cli import Parser, command_line
from workflow.data.folder import list_images
from workflow.errors import WorkflowError
from workflow.files import digest_file
from workflow.image_classifier import read_image
from workflow.model import backbone, network
from workflow.settings import settings
from workflow.tracking.connection import command_for_mlflow, connect_mlflow

import mlflow
import numpy as np
from sklearn.metrics import balanced_accuracy_score

PREDICTED_AT_ONCE = 100  # photos, which bounds the memory
PICTURED = {"the lab's network": "tab:gray", "small network": "tab:orange", "default": "tab:blue"}


class Photos:
    """The photos of a folder, their labels, and what variants learn from, which is computed once, when it is needed."""

    def __init__(self, source: Path):
        classes = list_images(source)
        self.class_names, self.seconds = list(classes), {}
        self.files = [file for files in classes.values() for file in files]
        self.digests = np.array([digest_file(file) for file in self.files])
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()])
        self.read, self.look = functools.cache(self.read), functools.cache(self.look)

    def read(self, size: int) -> np.ndarray:
        try:
            return np.stack([read_image(file, size) for file in self.files])
        except ValueError as error:
            raise WorkflowError(f"a photo in {self.files[0].parent.parent} cannot be used: {error}") from error

    def look(self, name: str) -> np.ndarray:
        """What a variant learns from, or one view of it; the seconds are noted, without those of a first batch."""
        compute = look_with(name)
        pixels = self.read(SIZES.get(name, backbone.IMAGE_SIZE))
        compute(pixels[: backbone.BATCH])
        start = time.perf_counter()
        found = compute(pixels)
        self.seconds[name] = time.perf_counter() - start
        return found

    def inputs(self, looks: tuple[str, ...], normalised: bool) -> np.ndarray:
        """One look as it is, or the features of several views, of which the mean is taken as in backbone.py."""
        found = np.stack([self.look(name) for name in looks])
        if looks[0].split()[0] not in CUTS:
            return found[0]
        if not normalised:
            return found.mean(axis=0)
        mean = (found / np.linalg.norm(found, axis=2, keepdims=True)).mean(axis=0)
        return backbone.LENGTH * mean / np.linalg.norm(mean, axis=1, keepdims=True)


def judge(
    train: Callable, inputs: np.ndarray, labels: np.ndarray, digests: np.ndarray, arguments
) -> tuple[list[float], float, object]:
    """The balanced accuracy for each seed, the seconds of one fit, and the last model."""
    import keras
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    accuracies, seconds = [], []
    for seed in range(1, arguments.seeds + 1):
        answers = np.full(len(labels), -1)
        for folder, held_out in split_photos(labels, arguments.photos, arguments.folds, seed):
            learned = folder[split_by_product(labels[folder], digests[folder]) != "test"]
            keras.utils.clear_session()
            keras.utils.set_random_seed(seed)
            start = time.perf_counter()
            model = train(inputs[learned], labels[learned], seed)
            seconds.append(time.perf_counter() - start)
            for rows in np.array_split(held_out, -(-len(held_out) // PREDICTED_AT_ONCE)):
                answers[rows] = model(inputs[rows], training=False).numpy().argmax(axis=1)
        judged = answers >= 0
        accuracies.append(balanced_accuracy_score(labels[judged], answers[judged]))
    return accuracies, float(np.mean(seconds)), model


def measure_model(model, classes: int, is_whole: bool) -> dict[str, float]:
    """How many parameters have learned, and the size of the model's file; all heads with their backbone have one."""
    whole = model if is_whole else network.on_pixels(network.build_head(classes, 0), backbone.NAME)
    with tempfile.TemporaryDirectory() as folder:
        whole.save(file := Path(folder, "model.keras"))
        megabytes = file.stat().st_size / 1e6
    return {"parameters": sum(weights.shape.num_elements() for weights in model.trainable_weights), "MB": megabytes}


def compare(photos: Photos, name: str, tasks: list[list[str]], arguments) -> dict[str, float]:
    """The metrics of a variant; seconds, size and parameters are those of the first task."""
    (looks, train), metrics = VARIANTS[name], {}
    inputs = photos.inputs(looks, normalised=name != "not normalised")
    for number, task in enumerate(tasks, 1):
        rows = np.isin(photos.labels, [photos.class_names.index(one) for one in task])
        labels = np.unique(photos.labels[rows], return_inverse=True)[1]
        accuracies, seconds, model = judge(train, inputs[rows], labels, photos.digests[rows], arguments)
        metrics |= {f"accuracy_{number}": float(np.mean(accuracies)), f"lowest_seed_{number}": min(accuracies)}
        if number == 1:
            metrics |= {"seconds_per_fit": seconds} | measure_model(model, len(task), looks[0] in SIZES)
    return metrics | {"seconds_per_20_photos": 20 * sum(photos.seconds[look] for look in looks) / len(photos.files)}


def plot(rows: dict[str, dict[str, float]], tasks: list[list[str]], photos: int, file: Path) -> None:
    """Draws the balanced accuracy of the networks in PICTURED as bars, one group per task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    place = figure.subplots()
    shown = [name for name in PICTURED if name in rows]
    width = 0.8 / len(shown)
    for number, name in enumerate(shown):
        heights = [rows[name][f"accuracy_{task}"] for task in range(1, len(tasks) + 1)]
        bars = place.bar(np.arange(len(tasks)) + number * width, heights, width, label=name, color=PICTURED[name])
        place.bar_label(bars, fmt="%.2f", fontsize=8)
    names = [", ".join(task) if len(task) < 4 else f"{len(task)} classes" for task in tasks]
    place.set_xticks(np.arange(len(tasks)) + 0.4 - width / 2, [name.replace(", ", ",\n") for name in names])
    place.set(ylim=(0, 1.1), ylabel="balanced accuracy on unseen photos", title=f"After {photos} photos per class")
    place.legend(loc="upper center", ncols=len(shown), bbox_to_anchor=(0.5, -0.2), frameon=False)
    figure.savefig(file)


def parse_arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos per class")
    parser.add_argument("--tasks", nargs="+", metavar="A,B", help="class folders, with commas; all of them by default")
    parser.add_argument("--photos", type=int, default=10, help="per class in the folder of a run")
    parser.add_argument("--folds", type=int, metavar="N", help="cross-validate with so many folds instead")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="of variants, such as 'no dropout'")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw three of the variants as bars, in a PNG")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    photos = Photos(arguments.source)
    tasks = [task.split(",") for task in arguments.tasks or [",".join(photos.class_names)]]
    if unknown := {name for task in tasks for name in task} - set(photos.class_names):
        raise WorkflowError(f"{arguments.source} has no class {', '.join(sorted(unknown))}")
    connect_mlflow(settings.mlflow_url, settings.state, "unseen")
    print(f"balanced accuracy, the mean of {arguments.seeds} seeds (that of the lowest); {describe_machine()}")
    for number, task in enumerate(tasks, 1):
        print(f"{number}: {', '.join(task)}")
    numbers = range(1, len(tasks) + 1)
    print(f"{'':22}" + "".join(f"{number:>8}{'':7}" for number in numbers) + " s per fit  s per 20     MB    trained")
    rows = {}
    with mlflow.start_run(run_name=arguments.source.name):
        for name in arguments.only or VARIANTS:
            with mlflow.start_run(run_name=name, nested=True):
                figures = rows[name] = compare(photos, name, tasks, arguments)
                mlflow.log_params(
                    {"variant": name, "tasks": tasks, "photos": arguments.photos, "folds": arguments.folds}
                )
                mlflow.log_metrics(figures)
            cells = "   ".join(f"{figures[f'accuracy_{n}']:.3f} ({figures[f'lowest_seed_{n}']:.2f})" for n in numbers)
            costs = f"{figures['seconds_per_fit']:10.1f}{figures['seconds_per_20_photos']:10.2f}{figures['MB']:7.1f}"
            print(f"{name:25}{cells}{costs}{figures['parameters']:11,}", flush=True)
    if arguments.picture:
        plot(rows, tasks, arguments.photos, arguments.picture)
    if told := command_for_mlflow():
        print(told)


if __name__ == "__main__":
    with command_line("unseen.py"):
        main()
