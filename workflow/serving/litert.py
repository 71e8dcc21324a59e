"""Export a registered model in the LiteRT format (formerly TensorFlow Lite), which runs without TensorFlow.

A version that becomes the champion is exported, and the export is stored with it in MLflow. For phones and small
devices, run:

    python predict.py --export FOLDER

This also writes `model.tflite`, `labels.txt` and `model.json`, which documents the preprocessing, the thresholds for
unknown and unsure images, and how well the exported model agrees with the original on photos of its run.
`model-8bit.tflite`, a quarter of the size, is kept only if it predicts the same label for each of these photos.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from workflow.errors import WorkflowError, explain_os_errors, first_line
from workflow.files import group, sha256, write_whole
from workflow.image_classifier import READING_VERSION, Classifier, ImagePrediction, Whitening, predict_batch
from workflow.model.served_model import get_reference_embeddings
from workflow.records import DataVersion
from workflow.serving.litert_classifier import (
    DESCRIPTION,
    FLOAT,
    FOLDER,
    OUTPUTS,
    TOLERANCE,
    LiteRTClassifier,
    describe_agreement,
)
from workflow.serving.registered_model import RegisteredModel, load, read_data
from workflow.text import printable

import mlflow
from mlflow.exceptions import MlflowException

MAX_PHOTOS = 30  # compared, test photos first
MAX_PHOTO_BYTES = 100_000_000  # in total
EIGHT_BIT, LABELS = "model-8bit.tflite", "labels.txt"
EXPORTED_FILES = (FLOAT, EIGHT_BIT, LABELS, DESCRIPTION)


class PhotoPredictions(NamedTuple):
    """The predictions of a classifier for photos."""

    predictions: list[ImagePrediction]
    milliseconds: float  # median per photo


def add_export(uri: str, data: DataVersion) -> str:
    """Store a LiteRT export with a model in MLflow, and return a message about how well they agree.

    Args:
        uri: MLflow model URI
        data: images of the model's run
    """
    registered, photos = load(uri, "Keras"), read_photos(data)
    with tempfile.TemporaryDirectory() as name:
        try:
            expected = predict(registered.classifier, photos)
            _, agreement = convert(registered, Path(name, FLOAT), photos, expected)
        except Exception as error:  # TensorFlow's converter may raise any exception
            return f"LiteRT export failed: {first_line(error)}"
        write_description(registered, Path(name), {FLOAT: agreement})
        store(registered, Path(name))
    return f"LiteRT export: {describe_agreement(agreement)}"


def check_folder(folder: Path) -> None:
    """Raise WorkflowError if an export to a folder would replace files that no earlier export wrote."""
    existing = [name for name in EXPORTED_FILES if (folder / name).exists()]
    try:
        is_ours = "compared" in json.loads((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError, TypeError):
        is_ours = False
    if existing and not is_ours:
        raise WorkflowError(f"{folder} has a {existing[0]} that is not from an export; export to another folder")


def export(registered: RegisteredModel, folder: Path) -> list[str]:
    """Write the files to a folder, store the export with the model, and return a summary as lines of text.

    Raises:
        WorkflowError: the folder is not writable, or the predictions of model.tflite differ from the model's
    """
    check_folder(folder)
    import tensorflow as tf

    classifier: Any = registered.classifier
    photos = read_photos(read_data(registered.run_id))
    expected = predict(classifier, photos)
    megabytes = sum(weight.numpy().nbytes for weight in classifier.model.weights) / 1e6
    lines, agreements = [describe_cost("the model", megabytes, expected)], {}
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in EXPORTED_FILES:  # from an earlier export, possibly of another model
            (folder / name).unlink(missing_ok=True)
        for name, optimizations in ((FLOAT, []), (EIGHT_BIT, [tf.lite.Optimize.DEFAULT])):
            path = folder / name
            predictions, agreement = convert(registered, path, photos, expected, optimizations)
            cost = describe_cost(name, agreement["megabytes"], predictions)
            lines.append(f"{cost}; {describe_agreement(agreement)}")
            if name == FLOAT and agreement["largest difference"] > TOLERANCE:
                path.unlink()
                difference = describe_agreement(agreement)
                raise WorkflowError(f"{path} was deleted, because it predicts differently from the model: {difference}")
            if name == EIGHT_BIT and (not photos or agreement["same label"] < len(photos)):
                path.unlink()
                lines[-1] += "; deleted, because its labels may differ from the model's"
            else:
                agreements[name] = agreement
        write_whole(folder / LABELS, "".join(f"{printable(name)}\n" for name in registered.class_names).encode())
        write_description(registered, folder, agreements)
    try:
        store(registered, folder)
    except (MlflowException, OSError) as error:
        lines.append(f"not stored in MLflow: {first_line(error)}")
    return lines


def read_photos(data: DataVersion) -> list[bytes]:
    """Return the photos of a data version that still exist, test photos first."""
    used = sorted((image for image in data.files if image.split), key=lambda image: image.split != "test")

    def read_existing() -> Iterator[bytes]:
        for image in used:
            with suppress(OSError):
                yield data.read(image.file)

    return next(group(read_existing(), len, MAX_PHOTOS, MAX_PHOTO_BYTES), [])


def convert(
    registered: RegisteredModel,
    path: Path,
    photos: list[bytes],
    expected: PhotoPredictions,
    optimizations: Sequence[Any] = (),
) -> tuple[PhotoPredictions, dict[str, float]]:
    """Write a .tflite file, and return its predictions for the photos and how well they agree with the expected ones.

    Args:
        registered: the model, loaded with Keras
        path: file to write
        photos: contents of image files
        expected: the model's predictions
        optimizations: of TensorFlow's converter
    """
    model = build(registered.classifier)
    model.export(str(path), format="litert", verbose=False, optimizations=list(optimizations))
    predictions = predict(LiteRTClassifier(path.read_bytes(), describe_use(registered)), photos)
    agreement = compare(expected.predictions, predictions.predictions)
    return predictions, agreement | {"megabytes": round(path.stat().st_size / 1e6, 1)}


def build(classifier: Any):
    """Return a Keras model from an image (1, size, size, 3) to the OUTPUTS or, without a backbone, to probabilities."""
    import keras

    pixels = keras.Input((classifier.image_size, classifier.image_size, 3), batch_size=1, name="pixels")
    whitening = getattr(classifier, "whitening", None)
    whitening = whitening and Whitening(*whitening)  # the methods of earlier releases differ
    outputs = predict_batch(classifier.model, get_reference_embeddings(classifier), whitening, pixels)
    return keras.Model(pixels, dict(zip(OUTPUTS, outputs, strict=False)))


def predict(classifier: Classifier, photos: list[bytes]) -> PhotoPredictions:
    """Return the predictions for image files, and measure the time per photo."""
    predictions, seconds = [], []
    for content in photos:
        pixels = classifier.decode(content)
        if isinstance(pixels, str):
            raise WorkflowError(f"a photo of the model's run is unusable: {pixels}")
        start = time.perf_counter()
        predictions += classifier.classify([pixels])
        seconds.append(time.perf_counter() - start)
    return PhotoPredictions(predictions, 1000 * median(seconds or [0.0]))


def compare(expected: list[ImagePrediction], predictions: list[ImagePrediction]) -> dict[str, float]:
    """Return how well the predictions of two classifiers for the same photos agree."""
    pairs = list(zip(expected, predictions, strict=True))
    differences = [
        abs(first.probabilities[name] - second.probabilities[name])
        for first, second in pairs
        for name in first.probabilities
    ]
    return {
        "photos": len(pairs),
        "same label": sum(first.label == second.label for first, second in pairs),
        "same unknown": sum(bool(first.unknown) == bool(second.unknown) for first, second in pairs),
        "largest difference": max(differences, default=0.0),
    }


def get_max_novelty(classifier: Any) -> float | None:
    """Return the novelty above which an image is unknown; None if the model has no threshold.

    Version 1.0 had a minimum similarity instead.
    """
    max_novelty = getattr(classifier, "max_novelty", 1 - getattr(classifier, "limit", math.nan))
    return None if math.isnan(max_novelty) else max_novelty


def describe_use(registered: RegisteredModel) -> dict[str, Any]:
    """Return the input, outputs, preprocessing and thresholds of model.tflite."""
    classifier: Any = registered.classifier
    size, unsure_below, max_novelty = classifier.image_size, classifier.unsure_below, get_max_novelty(classifier)
    unknown = "novelty > unknown_above: the image probably shows none of the classes"
    unsure = "highest probability < unsure_below: do not rely on the label"
    output = "probabilities: float32, shape (1, labels)"
    if get_reference_embeddings(classifier) is not None:
        output += "; similarity and novelty: float32, shape (1,); nearest: index in reference_files, shape (1,)"
    return {
        "model": registered.origin,
        "run_id": registered.run_id,
        "data_digest": registered.data_digest,
        "labels": registered.class_names,
        "input": f"pixels: float32, shape (1, {size}, {size}, 3), RGB from 0 to 255",
        "image_size": size,
        "preparation": f"apply the EXIF orientation, and resize to {size} x {size} pixels",
        "reading_version": READING_VERSION,
        "output": output,
        "unknown": "not available for this model" if max_novelty is None else unknown,
        "unknown_above": max_novelty,
        "unsure": "not available for this model" if unsure_below is None else unsure,
        "unsure_below": unsure_below,
        "reference_files": getattr(classifier, "files", []),
    }


def write_description(registered: RegisteredModel, folder: Path, agreements: dict[str, dict[str, float]]) -> None:
    """Write model.json next to model.tflite."""
    digest = sha256((folder / FLOAT).read_bytes())
    description = describe_use(registered) | {"compared": agreements, "sha256": digest}
    write_whole(folder / DESCRIPTION, json.dumps(description, indent=2, ensure_ascii=False).encode())


def store(registered: RegisteredModel, folder: Path) -> None:
    """Store model.tflite and model.json with the model in MLflow."""
    for name in (FLOAT, DESCRIPTION):
        mlflow.MlflowClient().log_model_artifact(registered.model_id, str(folder / name), FOLDER)


def describe_cost(name: str, megabytes: float, predictions: PhotoPredictions) -> str:
    """Return a line with the size of a network and, if there are photos, its speed."""
    speed = f", {predictions.milliseconds:6.1f} ms per photo" if predictions.predictions else ""
    return f"{name:18} {megabytes:5.1f} MB{speed}"
