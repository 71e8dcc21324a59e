"""The default model beside candidates that differ from it in one thing: which generalises best from few photos?

    python benchmarks/candidates.py --source FOLDER [--seeds 5] [--folds 5] [--only NAME ...]

Cross-validated: each photo is held out once a seed, and judged as it is (accuracy) and as somebody else might have
taken it (robustness: the mean over TRANSFORMS). MLflow keeps a parent run with a child run for each candidate.
"""

import io
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measure import PROJECT

sys.path.insert(0, str(PROJECT))
import tracking
import cross_validation
import image_folder
import ml_workflow
import network
from image_classifier import read_image

import mlflow
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

SIZE = 192  # pixels of a photo while it is transformed; then it is shrunk to what the network takes
WOOD, NEAR = (140, 95, 55), 40  # another background; how far a plain one may be from the colour of the corners


def other_background(image: Image.Image) -> Image.Image:
    """A brown table where the colour is that of the corners."""
    pixels = np.asarray(image).astype(int)
    corner = np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    plain = np.abs(pixels - corner).max(axis=2, keepdims=True) < NEAR
    return Image.fromarray(np.where(plain, WOOD, pixels).astype("uint8"))


def jpeg(image: Image.Image) -> Image.Image:
    image.save(file := io.BytesIO(), "JPEG", quality=10)
    return Image.open(file).convert("RGB")


def several(image: Image.Image) -> Image.Image:
    """Four in one: as it is, mirrored, upside down, and its middle."""
    whole = Image.new("RGB", (2 * SIZE, 2 * SIZE))
    parts = (image, ImageOps.mirror(image), ImageOps.flip(image), ImageOps.crop(image, SIZE // 5).resize(image.size))
    for place, part in enumerate(parts):
        whole.paste(part, (place % 2 * SIZE, place // 2 * SIZE))
    return whole


TRANSFORMS = {
    "background": other_background,
    "smaller": lambda image: ImageOps.expand(image, SIZE // 3, image.getpixel((0, 0))),
    "crop": lambda image: ImageOps.crop(image, SIZE // 5),
    "corner": lambda image: image.crop((0, 0, SIZE * 2 // 3, SIZE * 2 // 3)),
    "rotation": lambda image: image.rotate(30, fillcolor=image.getpixel((0, 0))),
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
    "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.5),
    "warm": lambda image: Image.fromarray((np.asarray(image) * (1, 0.95, 0.75)).astype("uint8")),
    "cold": lambda image: Image.fromarray((np.asarray(image) * (0.8, 0.95, 1)).astype("uint8")),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
    "jpeg": jpeg,
    "several": several,
}


def default(
    classes: int, seed: int, size=ml_workflow.IMAGE_SIZE, filters=ml_workflow.FILTERS, dropout=ml_workflow.DROPOUT
):
    return network.build_model(classes, size, filters, dropout, seed=seed)


def changed(change):
    """Builds the default with each of its layers replaced by the list that change() gives for it."""
    import keras

    def build(classes: int, seed: int):
        layers = default(classes, seed).layers
        anew = [type(layer).from_config(layer.get_config()) for layer in layers]  # shapes may change
        return keras.Sequential([keras.Input((None, None, 3)), *(new for layer in anew for new in change(layer))])

    return build


def unpenalised(layer) -> list:
    layer.activity_regularizer = None
    return [layer]


def smoothed(classes: int, seed: int):
    """Instead of a penalty on the logits, a label is right in 95 of 100 cases (with two classes)."""
    import keras

    def loss(labels, probabilities):
        targets = keras.ops.one_hot(keras.ops.cast(labels, "int32"), classes)
        return keras.losses.categorical_crossentropy(targets, probabilities, label_smoothing=0.1)

    class Smoothed(keras.Sequential):
        def compile(self, optimizer, _, **options):
            super().compile(optimizer, loss, **options)

    return Smoothed(changed(unpenalised)(classes, seed).layers)


def candidates() -> dict[str, dict]:
    """What each candidate changes: how the model is built, its image size, or a parameter of the training."""
    from keras import layers

    def without(kinds, names=()):
        return changed(lambda layer: [] if isinstance(layer, kinds) or layer.name in names else [layer])

    def after(kind, *makes):
        return changed(lambda layer: [layer, *(make() for make in makes)] if isinstance(layer, kind) else [layer])

    geometry = (layers.RandomRotation, layers.RandomTranslation, layers.RandomZoom)
    light = (layers.RandomBrightness, layers.RandomGrayscale)

    def average(layer) -> list:
        return [layers.GlobalAveragePooling2D() if isinstance(layer, layers.GlobalMaxPooling2D) else layer]

    return {
        "default": {},
        "no augmentation": {"build": without((*geometry, *light, layers.RandomFlip))},
        "no geometry": {"build": without(geometry)},
        "no grayscale": {"build": without(layers.RandomGrayscale)},
        "saturation too": {
            "build": after(layers.RandomFlip, lambda: layers.RandomSaturation((0.3, 0.7), value_range=(0, 255)))
        },
        "average pooling": {"build": changed(average)},
        "batch normalisation": {"build": after(layers.Conv2D, layers.BatchNormalization)},
        "two convolutions": {"build": without((), ["convolution_4"])},
        "half the filters": {"build": partial(default, filters=ml_workflow.FILTERS // 2)},
        "dropout 0.5": {"build": partial(default, dropout=0.5)},
        "no logit penalty": {"build": changed(unpenalised)},
        "label smoothing": {"build": smoothed},
        "48 pixels": {"build": partial(default, size=48), "image_size": 48},
        "half the epochs": {"epochs": ml_workflow.EPOCHS // 2},
        "half the rate": {"learning_rate": ml_workflow.LEARNING_RATE / 2},
        "twice the rate": {"learning_rate": 2 * ml_workflow.LEARNING_RATE},
    }


def read_photos(source: Path) -> tuple[list[Image.Image], np.ndarray]:
    """All images of a folder of class folders, and their labels."""
    classes = image_folder.list_images(source)
    photos, labels = [], []
    for label, files in enumerate(classes.values()):
        for file in files:
            try:
                photos.append(Image.fromarray(read_image(file, SIZE)))
            except ValueError as error:
                raise tracking.WorkflowError(f"{file}: {error}") from error
            labels.append(label)
    return photos, np.array(labels)


def shrunk(photos: list[Image.Image], size: int) -> np.ndarray:
    return np.stack([np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC)) for photo in photos])


def judge(photos: list, labels: np.ndarray, seeds: int, folds: int, build=default, **changes) -> tuple[dict, dict]:
    """The parameters and the metrics of a candidate."""
    names = ("image_size", "epochs", "batch_size", "learning_rate")
    parameters = {name: getattr(ml_workflow, name.upper()) for name in names} | changes
    size, *training = parameters.values()
    views = {"accuracy": shrunk(photos, size)}
    views |= {f"robust_{name}": shrunk(map(change, photos), size) for name, change in TRANSFORMS.items()}
    right, start = {name: np.zeros((seeds, len(photos))) for name in views}, time.perf_counter()
    for seed in range(seeds):
        fits = (views["accuracy"], labels, partial(build, len(set(labels))), *training, seed + 1, folds)
        for model, held_out in cross_validation.cross_validate(*fits):
            pixels = np.concatenate([view[held_out] for view in views.values()])
            answers = model(pixels, training=False).numpy().argmax(axis=1).reshape(len(views), -1)
            for name, answer in zip(views, answers, strict=True):
                right[name][seed, held_out] = answer == labels[held_out]
    metrics = {name: found.mean() for name, found in right.items()}
    metrics["lowest_seed"] = right["accuracy"].mean(axis=1).min()
    metrics["robustness"] = np.mean([metrics[f"robust_{name}"] for name in TRANSFORMS])
    metrics["seconds"] = (time.perf_counter() - start) / seeds / folds
    with tempfile.TemporaryDirectory() as folder:
        model.save(file := Path(folder, "model.keras"))
        metrics |= {"parameters": model.count_params(), "megabytes": file.stat().st_size / 1e6}
    return parameters | {"seeds": seeds, "folds": folds}, {name: float(value) for name, value in metrics.items()}


def main() -> None:
    parser = tracking.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="a folder with one folder of photos a class")
    parser.add_argument("--seeds", type=int, choices=range(1, 101), metavar="N", default=5)
    parser.add_argument("--folds", type=int, choices=range(2, 101), metavar="N", default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the candidates to train, such as 'average pooling'")
    arguments = parser.parse_args()
    photos, labels = read_photos(arguments.source)
    if np.bincount(labels).min() < arguments.folds:
        raise tracking.WorkflowError(f"{arguments.source}: each class needs {arguments.folds} images, one a fold")
    chosen = candidates()
    if unknown := set(arguments.only or chosen) - set(chosen):
        raise tracking.WorkflowError(
            f"--only: no candidate {', '.join(sorted(unknown))}; there are {', '.join(chosen)}"
        )
    told = tracking.connect_mlflow(ml_workflow.TRACKING_URI, PROJECT, "candidates")
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    columns = ("accuracy", "lowest_seed", "robustness", *(f"robust_{name}" for name in TRANSFORMS))
    print(f"{'':20}", *(f"{name.removeprefix('robust_')[:6]:>6}" for name in columns), "params    MB  s a fit")
    with mlflow.start_run(run_name=arguments.source.name):
        for name in arguments.only or chosen:
            with mlflow.start_run(run_name=name, nested=True):
                parameters, metrics = judge(photos, labels, arguments.seeds, arguments.folds, **chosen[name])
                mlflow.log_params({"candidate": name} | parameters)
                mlflow.log_metrics(metrics)
            figures = " ".join(f"{metrics[column]:6.3f}" for column in columns)
            size = f"{metrics['parameters']:6.0f} {metrics['megabytes']:5.2f}{metrics['seconds']:9.1f}"
            print(f"{name:20} {figures} {size}", flush=True)
    print(told)


if __name__ == "__main__":
    with tracking.command_line("candidates.py"):
        main()
