"""Measure the accuracy of models on unseen photos, after training on a folder of ten photos per class.

    python benchmarks/unseen.py --source FOLDER [--tasks "A,B" "C,D,E" ...] [--photos 10] [--folds N] [--only NAME ...]
                                [--seeds 5] [--picture FILE]

A task is a set of classes. For each seed, --photos photos per class are sampled. As in a run, the test images of the
sample are withheld, and the model is trained on the others. It is evaluated on all photos outside the sample, by its
balanced accuracy (the mean recall of the classes). If a class has no other photos, five-fold cross-validation is used
instead. Each variant differs from the default in one respect. MLflow records a parent run with a child run per variant.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lib.held_out import split_photos
from lib.machine import describe_machine
from lib.product import split_like_run
from lib.variants import CROPS, SIZES, VARIANTS, make_input_function

from workflow.cli import Parser, command_line
from workflow.data.folder import list_images
from workflow.errors import WorkflowError
from workflow.files import digest_file
from workflow.image_classifier import read_image
from workflow.model import backbone
from workflow.model.feature_set import normalize
from workflow.model.head import add_backbone, build_head
from workflow.settings import settings
from workflow.tracking.connection import connect_mlflow, describe_mlflow_command

import mlflow
import numpy as np
from sklearn.metrics import balanced_accuracy_score

BLOCK = 100  # photos predicted at once, to limit memory
COLORS = {"the lab's network": "tab:gray", "small network": "tab:orange", "default": "tab:blue"}


class Photos:
    """The photos of a folder, their labels, and the inputs of the variants, computed once on demand."""

    def __init__(self, source: Path):
        classes = list_images(source)
        self.class_names, self.seconds = list(classes), {}
        self.files = [file for files in classes.values() for file in files]
        self.digests = np.array([digest_file(file) for file in self.files])
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()])
        self.read, self.compute = functools.cache(self.read), functools.cache(self.compute)

    def read(self, size: int) -> np.ndarray:
        try:
            return np.stack([read_image(file, size) for file in self.files])
        except ValueError as error:
            raise WorkflowError(f"cannot read a photo in {self.files[0].parent.parent}: {error}") from error

    def compute(self, name: str) -> np.ndarray:
        """Return the inputs or view features with this name, and time their computation after a first batch."""
        compute = make_input_function(name)
        pixels = self.read(SIZES.get(name, backbone.IMAGE_SIZE))
        compute(pixels[: backbone.BATCH])
        start = time.perf_counter()
        inputs = compute(pixels)
        self.seconds[name] = time.perf_counter() - start
        return inputs

    def inputs(self, names: tuple[str, ...]) -> np.ndarray:
        """Return the inputs with this name, or the mean of the features of several views, as in backbone.py."""
        if names[0] not in CROPS:
            return self.compute(names[0])
        return backbone.LENGTH * normalize(np.mean([normalize(self.compute(name)) for name in names], axis=0))


def evaluate(
    train: Callable, inputs: np.ndarray, labels: np.ndarray, digests: np.ndarray, arguments
) -> tuple[list[float], float, object]:
    """Return the balanced accuracy of each seed, the mean time of a fit in seconds, and the last model."""
    import keras
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    accuracies, seconds = [], []
    for seed in range(1, arguments.seeds + 1):
        predicted = np.full(len(labels), -1)
        for sample, held_out in split_photos(labels, arguments.photos, arguments.folds, seed):
            rows = sample[split_like_run(labels[sample], digests[sample]) != "test"]
            keras.utils.clear_session()
            keras.utils.set_random_seed(seed)
            start = time.perf_counter()
            model = train(inputs[rows], labels[rows], seed)
            seconds.append(time.perf_counter() - start)
            for rows in np.array_split(held_out, -(-len(held_out) // BLOCK)):
                predicted[rows] = model(inputs[rows], training=False).numpy().argmax(axis=1)
        is_held_out = predicted >= 0
        accuracies.append(balanced_accuracy_score(labels[is_held_out], predicted[is_held_out]))
    return accuracies, float(np.mean(seconds)), model


def measure_model(model, classes: int, is_whole: bool) -> dict[str, float]:
    """Return the number of trained parameters, and the size of the model's file with its backbone."""
    whole = model if is_whole else add_backbone(build_head(classes, 0))
    with tempfile.TemporaryDirectory() as folder:
        whole.save(file := Path(folder, "model.keras"))
        megabytes = file.stat().st_size / 1e6
    return {"parameters": sum(weights.shape.num_elements() for weights in model.trainable_weights), "MB": megabytes}


def compare(photos: Photos, name: str, tasks: list[list[str]], arguments) -> dict[str, float]:
    """Return the metrics of a variant; seconds, size and parameters are those of the first task."""
    (names, train), metrics = VARIANTS[name], {}
    inputs = photos.inputs(names)
    for number, task in enumerate(tasks, 1):
        rows = np.isin(photos.labels, [photos.class_names.index(class_name) for class_name in task])
        labels = np.unique(photos.labels[rows], return_inverse=True)[1]
        accuracies, seconds, model = evaluate(train, inputs[rows], labels, photos.digests[rows], arguments)
        metrics |= {f"accuracy_{number}": float(np.mean(accuracies)), f"lowest_seed_{number}": min(accuracies)}
        if number == 1:
            metrics |= {"seconds_per_fit": seconds} | measure_model(model, len(task), names[0] in SIZES)
    return metrics | {"seconds_per_20_photos": 20 * sum(photos.seconds[name] for name in names) / len(photos.files)}


def plot(rows: dict[str, dict[str, float]], tasks: list[list[str]], photos: int, file: Path) -> None:
    """Plot the balanced accuracy of the variants in COLORS as bars, grouped by task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    names = [name for name in COLORS if name in rows]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [rows[name][f"accuracy_{task}"] for task in range(1, len(tasks) + 1)]
        bars = axes.bar(np.arange(len(tasks)) + number * width, heights, width, label=name, color=COLORS[name])
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    titles = [", ".join(task) if len(task) < 4 else f"{len(task)} classes" for task in tasks]
    axes.set_xticks(np.arange(len(tasks)) + 0.4 - width / 2, [title.replace(", ", ",\n") for title in titles])
    axes.set(ylim=(0, 1.1), ylabel="balanced accuracy on unseen photos", title=f"After {photos} photos per class")
    axes.legend(loc="upper center", ncols=len(names), bbox_to_anchor=(0.5, -0.2), frameon=False)
    figure.savefig(file)


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos per class")
    parser.add_argument("--tasks", nargs="+", metavar="A,B", help="class folders, comma-separated (default: all)")
    parser.add_argument("--photos", type=int, default=10, help="per class in the sample")
    parser.add_argument("--folds", type=int, metavar="N", help="cross-validate with N folds instead")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, metavar="NAME", help="variants, for example 'no dropout'"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG file for a bar chart of three variants")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    photos = Photos(arguments.source)
    tasks = [task.split(",") for task in arguments.tasks or [",".join(photos.class_names)]]
    if unknown := {name for task in tasks for name in task} - set(photos.class_names):
        raise WorkflowError(f"{arguments.source} has no class {', '.join(sorted(unknown))}")
    connect_mlflow(settings.mlflow_url, settings.state, "unseen")
    print(f"balanced accuracy, mean of {arguments.seeds} seeds (lowest seed); {describe_machine()}")
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
    if hint := describe_mlflow_command():
        print(hint)


if __name__ == "__main__":
    with command_line("unseen.py"):
        main()
