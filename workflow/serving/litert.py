"""A registered model as files for phones and small devices, in the format of LiteRT, which was TensorFlow Lite.

    python predict.py --export FOLDER

FOLDER gets `model.tflite`, `labels.txt` and `model.json`, which says how to prepare an image, above which novelty it is
unknown, below which probability it is unsure, and how well the answers agree with those of the model on the photos of
its run.
`model-8bit.tflite`, a quarter of the size, is kept only if it gives all these photos the same label.
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from workflow.errors import WorkflowError, explain_os_errors
from workflow.files import write_whole
from workflow.image_classifier import read_image
from workflow.model.keras_import import without_noise
from workflow.serving.photos import find_photos
from workflow.serving.registered_model import RegisteredModel
from workflow.text import printable

import numpy as np

COMPARED = 100  # photos of the run, the test photos first
TOLERANCE = 0.01  # of a probability, between the model and model.tflite
FLOAT, EIGHT_BIT, LABELS, ABOUT = "model.tflite", "model-8bit.tflite", "labels.txt", "model.json"
Network = Callable[[np.ndarray], dict[str, Any]]  # pixels (1, size, size, 3) to probabilities, similarity, novelty


class Answers(NamedTuple):
    """What a network says of photos."""

    probabilities: np.ndarray  # (photos, classes)
    unknown: np.ndarray  # (photos,), false without a limit
    milliseconds: float  # for a photo, the median


def export(registered: RegisteredModel, folder: Path) -> list[str]:
    """Writes the files into the folder; gives what there is to say, in lines.

    Raises WorkflowError when the folder cannot be written, or model.tflite does not give the answers of the model.
    """
    import tensorflow as tf

    classifier: Any = registered.model.unwrap_python_model()
    size, limit = classifier.image_size, get_max_novelty(classifier)
    photos, model = read_photos(registered, size), build(classifier)
    own = ask(tf.function(model), photos, limit)
    megabytes = sum(weight.numpy().nbytes for weight in model.weights) / 1e6
    lines = [describe_cost("the model", megabytes, own)]
    compared = {}
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FLOAT, EIGHT_BIT, LABELS, ABOUT):  # those of another model would give wrong labels
            (folder / name).unlink(missing_ok=True)
        for name, optimizations in ((FLOAT, []), (EIGHT_BIT, [tf.lite.Optimize.DEFAULT])):
            path = folder / name
            model.export(str(path), format="litert", verbose=False, optimizations=optimizations)
            found = ask(open_network(path), photos, limit)
            told = compare(own, found) | {"megabytes": round(path.stat().st_size / 1e6, 1)}
            lines.append(f"{describe_cost(name, told['megabytes'], found)}; {describe(told)}")
            if name == FLOAT and told["largest difference"] > TOLERANCE:
                path.unlink()
                raise WorkflowError(f"{path} was not kept, because its answers are others: {describe(told)}")
            if name == EIGHT_BIT and (not len(photos) or told["same label"] < len(photos)):
                path.unlink()
                lines[-1] += ". It was not kept, because it has to give all photos the same label"
            else:
                compared[name] = told
        write_whole(folder / LABELS, "".join(f"{printable(name)}\n" for name in registered.class_names).encode())
        about = describe_use(registered, size, limit) | {"compared": compared}
        write_whole(folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False).encode())
    return lines


def get_max_novelty(classifier: Any) -> float | None:
    """Return the novelty above which an image is unknown; None when the model cannot say it.

    Version 1 of this project limited the similarity instead.
    """
    limit = getattr(classifier, "max_novelty", 1 - getattr(classifier, "limit", math.nan))
    return None if math.isnan(limit) else limit


def describe_use(registered: RegisteredModel, size: int, limit: float | None) -> dict[str, Any]:
    """Return how model.tflite is used: its input and output, the preparation of an image, and its limits."""
    about = {
        "model": registered.origin,
        "labels": registered.class_names,
        "input": f"pixels: float32, shape (1, {size}, {size}, 3), RGB from 0 to 255",
        "preparation": f"turn the image upright as its EXIF data say, and shrink it to {size} x {size} pixels",
        "output": "probabilities: float32, shape (1, labels); similarity and novelty: float32, shape (1,)",
        "unknown": "novelty is higher than unknown_above: the image probably shows something else than the classes",
        "unknown_above": limit,
        "unsure": "the highest probability is lower than unsure_below: do not rely on the label",
        "unsure_below": (registered.model.model_config or {}).get("unsure_below"),
    }
    for name in ("unknown", "unsure"):
        if about[f"{name}_{'above' if name == 'unknown' else 'below'}"] is None:
            about[name] = "not available for this model"
    if not has_references(registered.model.unwrap_python_model()):
        about |= {"output": "probabilities: float32, shape (1, labels)"}
    return about


def has_references(classifier: Any) -> bool:
    """Return whether a model keeps the features of training photos, under today's name or that of version 1."""
    return hasattr(classifier, "references") or hasattr(classifier, "known")


def read_photos(registered: RegisteredModel, size: int) -> np.ndarray:
    """The pixels (photos, size, size, 3) of the photos of the model's run that are at hand, the test photos first."""
    photos = find_photos(registered.run_id)
    used = [image for image in photos.files.values() if image.split]
    chosen = sorted(used, key=lambda image: image.split != "test")[:COMPARED]
    contents = [photos.read(image.file) for image in chosen]
    found = [read_image(content, size) for content in contents if content is not None]
    return np.array(found, "uint8").reshape(-1, size, size, 3)


def build(classifier: Any):
    """Return a Keras model: one image (1, size, size, 3) in; its probabilities, similarity and novelty out.

    What workflow/image_classifier.py computes around the model is inside, so that a phone needs nothing else.
    """
    import keras
    from keras import layers, ops

    size = classifier.image_size
    pixels = keras.Input((size, size, 3), batch_size=1, name="pixels")
    if not has_references(classifier):
        return keras.Model(pixels, {"probabilities": classifier.model(pixels)})
    backbone, *head = classifier.model.layers
    features = probabilities = backbone(pixels)
    for layer in head:
        probabilities = layer(probabilities)
    units = layers.UnitNormalization()(features)

    def multiply(x, kernel: np.ndarray, name: str):
        dense = layers.Dense(kernel.shape[1], use_bias=False, name=name)
        product = dense(x)
        dense.set_weights([kernel])
        return product

    references = classifier.known if hasattr(classifier, "known") else classifier.references
    similarity = ops.max(multiply(units, references.T, "similarities"), axis=1)
    novelty = 1 - similarity
    if hasattr(classifier, "whitening"):  # computed as in ImageClassifier.compute_familiarity()
        center, scatter, whitened = classifier.whitening
        centered = units - center
        lengths = ops.sum(centered**2, axis=1) - ops.sum(multiply(centered, scatter, "scatter") ** 2, axis=1)
        familiarity = ops.max(multiply(centered, whitened.T, "familiarities"), axis=1) / ops.sqrt(lengths)
        novelty = 1 - familiarity * ops.sqrt(ops.max(probabilities, axis=1))
    return keras.Model(pixels, {"probabilities": probabilities, "similarity": similarity, "novelty": novelty})


def open_network(path: Path) -> Network:
    """The network in a .tflite file."""
    import tensorflow as tf

    with warnings.catch_warnings(), without_noise():
        # The same interpreter, of a package that TensorFlow does not bring, replaces this one in a later version.
        warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated", UserWarning)
        run = tf.lite.Interpreter(str(path)).get_signature_runner()
        run(**{name: np.zeros(one["shape"], "float32") for name, one in run.get_input_details().items()})
    return lambda pixels: run(pixels=pixels)


def ask(network: Network, photos: np.ndarray, limit: float | None) -> Answers:
    """The answers of a network to the photos, asked one by one."""
    probabilities, unknown, seconds = [], [], []
    for photo in photos:
        start = time.perf_counter()
        found = {name: np.asarray(value)[0] for name, value in network(photo[None].astype("float32")).items()}
        seconds.append(time.perf_counter() - start)
        probabilities.append(found["probabilities"])
        unknown.append(limit is not None and found["novelty"] > limit)
    return Answers(np.array(probabilities), np.array(unknown, bool), 1000 * median(seconds or [0.0]))


def compare(own: Answers, other: Answers) -> dict[str, float]:
    """How well two answers to the same photos agree."""
    if not len(own.probabilities):
        return {"photos": 0, "same label": 0, "same unknown": 0, "largest difference": 0.0}
    same = own.probabilities.argmax(axis=1) == other.probabilities.argmax(axis=1)
    return {
        "photos": len(same),
        "same label": int(same.sum()),
        "same unknown": int((own.unknown == other.unknown).sum()),
        "largest difference": float(np.abs(own.probabilities - other.probabilities).max()),
    }


def describe_cost(name: str, megabytes: float, answers: Answers) -> str:
    """The size of a file, and how long a photo takes where there were photos to ask about."""
    speed = f", {answers.milliseconds:6.1f} ms per photo" if len(answers.probabilities) else ""
    return f"{name:18} {megabytes:5.1f} MB{speed}"


def describe(told: dict[str, float]) -> str:
    """What compare() gives, in words."""
    if not told["photos"]:
        return "no photo of the run is at hand to compare the answers"
    return (
        f"{told['same label']} of {told['photos']} photos get the same label, {told['same unknown']} are known or "
        f"unknown as before, probabilities differ by {told['largest difference']:.4f} at most"
    )
