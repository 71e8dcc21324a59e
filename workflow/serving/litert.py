"""Export a registered model for phones and small devices, in the LiteRT format (formerly TensorFlow Lite).

    python predict.py --export FOLDER

Writes `model.tflite`, `labels.txt` and `model.json`, which documents the preprocessing, the thresholds for unknown and
unsure images, and how well the exported model agrees with the original on photos of its run. `model-8bit.tflite`, a
quarter of that size, is kept only if it predicts the same label for each of these photos.
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from workflow.errors import WorkflowError, explain_os_errors
from workflow.files import write_whole
from workflow.image_classifier import Whitening, predict_batch, read_image
from workflow.model.keras_import import suppress_noise
from workflow.model.served_model import get_reference_embeddings
from workflow.serving.registered_model import RegisteredModel, read_data
from workflow.text import printable

import numpy as np

MAX_PHOTOS = 100  # to compare the predictions for, test photos first
TOLERANCE = 0.01  # largest accepted difference in probability between the model and model.tflite
FLOAT, EIGHT_BIT, LABELS, DESCRIPTION = "model.tflite", "model-8bit.tflite", "labels.txt", "model.json"
OUTPUTS = "probabilities", "similarity", "novelty"
Network = Callable[[np.ndarray], dict[str, Any]]  # maps pixels (1, size, size, 3) to the OUTPUTS


class NetworkPredictions(NamedTuple):
    """The predictions of a network for photos."""

    probabilities: np.ndarray  # (photos, classes)
    unknown: np.ndarray  # (photos,); all False without a threshold
    milliseconds: float  # median per photo


def export(registered: RegisteredModel, folder: Path) -> list[str]:
    """Write the files to a folder, and return a summary as lines of text.

    Raises:
        WorkflowError: the folder is not writable, or the predictions of model.tflite differ from the model's
    """
    import tensorflow as tf

    classifier: Any = registered.model.unwrap_python_model()
    size, max_novelty = classifier.image_size, get_max_novelty(classifier)
    photos, model = read_photos(registered, size), build(classifier)
    expected = predict(tf.function(model), photos, max_novelty)
    megabytes = sum(weight.numpy().nbytes for weight in classifier.model.weights) / 1e6
    lines, agreements = [describe_cost("the model", megabytes, expected)], {}
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FLOAT, EIGHT_BIT, LABELS, DESCRIPTION):  # from an earlier export, maybe of another model
            (folder / name).unlink(missing_ok=True)
        for name, optimizations in ((FLOAT, []), (EIGHT_BIT, [tf.lite.Optimize.DEFAULT])):
            path = folder / name
            model.export(str(path), format="litert", verbose=False, optimizations=optimizations)
            predictions, size_mb = predict(open_network(path), photos, max_novelty), path.stat().st_size / 1e6
            agreement = compare(expected, predictions)
            lines.append(f"{describe_cost(name, size_mb, predictions)}; {describe_agreement(agreement)}")
            if name == FLOAT and agreement["largest difference"] > TOLERANCE:
                path.unlink()
                difference = describe_agreement(agreement)
                raise WorkflowError(f"{path} was deleted, because it predicts differently than the model: {difference}")
            if name == EIGHT_BIT and (not len(photos) or agreement["same label"] < len(photos)):
                path.unlink()
                lines[-1] += "; deleted, because it may predict other labels than the model"
            else:
                agreements[name] = agreement | {"megabytes": round(size_mb, 1)}
        write_whole(folder / LABELS, "".join(f"{printable(name)}\n" for name in registered.class_names).encode())
        description = describe_use(registered, size, max_novelty) | {"compared": agreements}
        write_whole(folder / DESCRIPTION, json.dumps(description, indent=2, ensure_ascii=False).encode())
    return lines


def get_max_novelty(classifier: Any) -> float | None:
    """Return the novelty above which an image is unknown; None if the model has no threshold.

    Version 1.0 had a minimum similarity instead.
    """
    max_novelty = getattr(classifier, "max_novelty", 1 - getattr(classifier, "limit", math.nan))
    return None if math.isnan(max_novelty) else max_novelty


def describe_use(registered: RegisteredModel, size: int, max_novelty: float | None) -> dict[str, Any]:
    """Return the input, output, preprocessing and thresholds of model.tflite."""
    unsure_below = (registered.model.model_config or {}).get("unsure_below")
    unknown = "novelty > unknown_above: the image probably shows none of the classes"
    unsure = "highest probability < unsure_below: do not rely on the label"
    output = "probabilities: float32, shape (1, labels)"
    if get_reference_embeddings(registered.model.unwrap_python_model()) is not None:
        output += "; similarity and novelty: float32, shape (1,)"
    return {
        "model": registered.origin,
        "labels": registered.class_names,
        "input": f"pixels: float32, shape (1, {size}, {size}, 3), RGB from 0 to 255",
        "preparation": f"apply the EXIF orientation, and resize to {size} x {size} pixels",
        "output": output,
        "unknown": "not available for this model" if max_novelty is None else unknown,
        "unknown_above": max_novelty,
        "unsure": "not available for this model" if unsure_below is None else unsure,
        "unsure_below": unsure_below,
    }


def read_photos(registered: RegisteredModel, size: int) -> np.ndarray:
    """Return the pixels (photos, size, size, 3) of photos of the model's run that still exist, test photos first."""
    data, pixels = read_data(registered.run_id), []
    used = [image for image in data.files if image.split]
    for image in sorted(used, key=lambda image: image.split != "test")[:MAX_PHOTOS]:
        with suppress(OSError):
            pixels.append(read_image(data.read(image.file), size))
    return np.array(pixels, "uint8").reshape(-1, size, size, 3)


def build(classifier: Any):
    """Return a Keras model from one image (1, size, size, 3) to the OUTPUTS, or to probabilities without a backbone."""
    import keras

    pixels = keras.Input((classifier.image_size, classifier.image_size, 3), batch_size=1, name="pixels")
    whitening = getattr(classifier, "whitening", None)
    whitening = whitening and Whitening(*whitening)  # the class of an earlier release has different methods
    outputs = predict_batch(classifier.model, get_reference_embeddings(classifier), whitening, pixels)
    return keras.Model(pixels, dict(zip(OUTPUTS, outputs, strict=False)))


def open_network(path: Path) -> Network:
    """Return the network in a .tflite file."""
    import tensorflow as tf

    with warnings.catch_warnings(), suppress_noise():
        # TensorFlow recommends the interpreter of another package, which would be one more dependency.
        warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated", UserWarning)
        run = tf.lite.Interpreter(str(path)).get_signature_runner()
        run(**{name: np.zeros(tensor["shape"], "float32") for name, tensor in run.get_input_details().items()})
    return lambda pixels: run(pixels=pixels)


def predict(network: Network, photos: np.ndarray, max_novelty: float | None) -> NetworkPredictions:
    """Return the predictions of a network for photos, and measure the time per photo."""
    probabilities, unknown, seconds = [], [], []
    for photo in photos:
        start = time.perf_counter()
        outputs = {name: np.asarray(value)[0] for name, value in network(photo[None].astype("float32")).items()}
        seconds.append(time.perf_counter() - start)
        probabilities.append(outputs["probabilities"])
        unknown.append(max_novelty is not None and outputs["novelty"] > max_novelty)
    return NetworkPredictions(np.array(probabilities), np.array(unknown, bool), 1000 * median(seconds or [0.0]))


def compare(expected: NetworkPredictions, predictions: NetworkPredictions) -> dict[str, float]:
    """Return how well the predictions of two networks agree on the same photos."""
    if not len(expected.probabilities):
        return {"photos": 0, "same label": 0, "same unknown": 0, "largest difference": 0.0}
    same_label = expected.probabilities.argmax(axis=1) == predictions.probabilities.argmax(axis=1)
    return {
        "photos": len(same_label),
        "same label": int(same_label.sum()),
        "same unknown": int((expected.unknown == predictions.unknown).sum()),
        "largest difference": float(np.abs(expected.probabilities - predictions.probabilities).max()),
    }


def describe_cost(name: str, megabytes: float, predictions: NetworkPredictions) -> str:
    """Return a line with the size of a network and, if there are photos, its speed."""
    speed = f", {predictions.milliseconds:6.1f} ms per photo" if len(predictions.probabilities) else ""
    return f"{name:18} {megabytes:5.1f} MB{speed}"


def describe_agreement(agreement: dict[str, float]) -> str:
    """Return the result of compare() as text."""
    if not agreement["photos"]:
        return "not compared with the model: no photos of the run are left"
    return (
        f"same label for {agreement['same label']} of {agreement['photos']} photos, same `unknown` for "
        f"{agreement['same unknown']}; probabilities differ by at most {agreement['largest difference']:.4f}"
    )
