"""Reading one image safely, and the model as MLflow serves it: image in, label out.

read_image() is the only way by which pixels reach the model, in training and in use. This file is logged with
each model, as its code, and imports nothing of the project.

A request is {"inputs": [image file in base64, ...]}, of up to MAX_IMAGES images. The answer to each is

    {"label": "oranges", "probability": 0.98, "probabilities": {"apples": 0.02, "oranges": 0.98},
     "similarity": 0.81, "unknown": false, "nearest": "oranges/orange-3.jpeg", "unsure": false}

`similarity` is the cosine between the features of the image and those of the training image that it is nearest to.
`unknown` is true when the image is more novel than 95% of the training images that were held out: it probably shows
something else, and its label means little. `unsure` is true when the probability is below the level from which on 95%
of the predictions were correct in cross-validation. A field is null when the model has no backbone, or
cross-validation could not set the limit.

When an image cannot be used, the status is 400 and the message names each that cannot: "inputs[3]: not an image:
unknown format". MLflow's server ends a request that takes longer than 60 s with 504
(MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT), and answers 500 to one without Content-Type.

In a program: mlflow.pyfunc.load_model("models:/apples-oranges@champion").predict(images). The Keras model alone is the
artifact models:/apples-oranges@champion/artifacts/model.keras, which Keras loads in safe mode.
"""

import base64
import functools
import io
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image, ImageOps
from pydantic import BaseModel

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # by content, whatever the file's ending
MAX_PIXELS = 50_000_000  # an image of this size or larger is refused: it may be a decompression bomb
READING_VERSION = 1  # increase when read_image() returns other pixels: cached features are then computed again
BATCH = 16  # images that the model is given at once: more are no faster, and need much memory
MAX_IMAGES = 2_000  # in one request
MAX_REQUEST = 300_000_000  # pixels to decode in one request, and in all large ones together
SHRINKAGE = 2.0  # added to the diagonal of the scatter within the classes, in units of its mean eigenvalue
MIN_SPREAD = 1e-3  # the lowest variance within the classes, for images that are nearly the same
LARGE_REQUEST = 10_000_000  # pixels: requests of more than that are decoded one after the other,
LARGE_AT_ONCE = 4  # and at most so many are let in: MLflow's server has threads for four more than there are cores


def read_image(source: Path | bytes, size: int) -> np.ndarray:
    """The first frame, upright, in RGB, shrunk to a square: uint8, shape (size, size, 3).

    Raises ValueError with the reason when the source is not a whole image that can be used.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height >= MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels: {MAX_PIXELS:,} or more are refused")
            image.draft("RGB", (2 * size, 2 * size))  # lets the JPEG decoder leave out what nobody will see
            small = convert_to_rgb(apply_orientation(image)).resize(
                (size, size), Image.Resampling.BICUBIC, reducing_gap=2.0
            )
            return np.asarray(blend_on_white(small))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image: {explain_unidentified(source)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{MAX_PIXELS:,} pixels or more are refused") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (SyntaxError, LookupError, TypeError, ArithmeticError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"damaged: {error}") from None  # what Pillow's decoders raise on hostile bytes


def explain_unidentified(source: Path | bytes) -> str:
    """Why a file is not an image that can be read."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC, as iPhones make it: export the photo as JPEG"
    return "unknown format" if start else "the file is empty"


def apply_orientation(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is where the EXIF data are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, struct.error):
        return image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, or in RGBA when some of it is transparent; 16 bits a channel become 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, "uint16") >> 8).astype("uint8"))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def blend_on_white(image: Image.Image) -> Image.Image:
    """The image in RGB; what is transparent becomes white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_base64(text: str) -> bytes | str:
    """The bytes of an image file in base64, or the reason why there are none."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        return f"not base64: {error}"


def count_pixels(content: bytes | str) -> int:
    """How many pixels have to be decoded, from the header of an image file alone; 0 for what cannot be read."""
    try:
        with Image.open(io.BytesIO(content if isinstance(content, bytes) else b""), formats=FORMATS) as image:
            share = 1 if image.format != "JPEG" else 2 if "progressive" in image.info else 8  # it is decoded in part
            return image.width * image.height // share
    except Exception:  # read_image() says what is wrong
        return 0


class Whitening(NamedTuple):
    """Features whitened by their scatter within the classes, with the references that they are compared with.

    The shrunk covariance is a multiple of the identity plus a term whose rank is at most the number of references, so
    inverting it takes a matrix of that size (Woodbury, 1950). Up to a factor, the squared length of whitened features x
    is |x - center|^2 - |(x - center) @ scatter|^2.

    Attributes:
        center: shape (n,)
        scatter: shape (n, references)
        references: whitened, so that a product with centered features is a cosine times the length of these
    """

    center: np.ndarray
    scatter: np.ndarray
    references: np.ndarray

    def compare(self, units: np.ndarray) -> np.ndarray:
        """Return the cosines (images, references) of whitened features to the references."""
        centered = units - self.center
        lengths = (centered**2).sum(axis=1) - ((centered @ self.scatter) ** 2).sum(axis=1)
        return centered @ self.references.T / np.sqrt(lengths)[:, None]


def fit_whitening(units: np.ndarray, labels: np.ndarray, dimensions: int) -> Whitening:
    """Fit a whitening to the scatter of the references within their classes.

    Args:
        units: features of length 1, shape (references, n)
        labels: of the references, shape (references,)
        dimensions: of the features; n is smaller where they are written in a basis of their span
    """
    classes, labels = np.unique(labels, return_inverse=True)
    means = np.stack([units[labels == label].mean(axis=0) for label in range(len(classes))])
    residuals = units - means[labels]
    degrees_of_freedom = max(len(units) - len(classes), 1)
    spread = max((residuals**2).sum(), degrees_of_freedom * MIN_SPREAD)
    gram = residuals @ residuals.T + np.eye(len(units)) * SHRINKAGE * spread / dimensions
    scatter = residuals.T @ np.linalg.inv(np.linalg.cholesky(gram)).T
    center = means.mean(axis=0) * len(classes) / (len(classes) + 1)  # nearer to the origin for few classes
    centered = units - center
    whitened = centered - centered @ scatter @ scatter.T
    whitened /= np.sqrt((centered * whitened).sum(axis=1, keepdims=True))
    return Whitening(*(array.astype(units.dtype) for array in (center, scatter, whitened)))


class Answer(BaseModel):
    """What the model says of one image; the labels are the names of the class folders."""

    label: str
    probability: float
    probabilities: dict[str, float]
    similarity: float | None = None  # to the nearest training image, -1 to 1
    unknown: bool | None = None  # whether it probably shows something else than the classes
    nearest: str | None = None  # the file of that training image
    unsure: bool | None = None  # whether the probability is too low to rely on the label


class UnusableError(MlflowException):
    """Says which of the images that a client sent cannot be used, and why."""

    def __init__(self, reasons: list[str]):
        super().__init__("; ".join(reasons), error_code=INVALID_PARAMETER_VALUE)  # HTTP 400

    def serialize_as_json(self) -> str:
        self.message = str(self)  # MLflow has put the whole request before it, with all its images
        return super().serialize_as_json()


class ImageClassifier(PythonModel):
    """The model as MLflow serves it: images in base64 in, answers out. `model` is the Keras model inside it."""

    def load_context(self, context: PythonModelContext) -> None:
        import keras
        import tensorflow as tf

        self.class_names, self.image_size = context.model_config["class_names"], context.model_config["image_size"]
        self.unsure_below = context.model_config.get("unsure_below")
        self.model = keras.saving.load_model(context.artifacts["model"])
        pixels = tf.TensorSpec((None, self.image_size, self.image_size, 3), tf.uint8)
        if "references" in context.artifacts:
            with np.load(context.artifacts["references"]) as references:
                self.files, self.max_novelty = references["files"].tolist(), float(references["max_novelty"])
                self.references = references["features"].astype("float32")
                self.whitening = fit_whitening(self.references, references["labels"], self.references.shape[1])
            self.call = tf.function(self.compare, [pixels], autograph=False)
        else:
            self.call = tf.function(lambda batch: [self.model(batch, training=False)], [pixels], autograph=False)
        self.large, self.counting, self.decoding = list[int](), threading.Lock(), threading.Lock()

    # MLflow takes a predict() without a context, but its types do not know that.
    def predict(self, model_input: list[str]) -> list[Answer]:  # type: ignore[override]
        """The answer to each image; raises UnusableError, which names all that cannot be used."""
        if len(model_input) > MAX_IMAGES:
            raise UnusableError([f"inputs: {len(model_input):,} images, at most {MAX_IMAGES:,} are taken at once"])
        contents = list(map(decode_base64, model_input))
        if (pixels := sum(map(count_pixels, contents))) > MAX_REQUEST:
            raise UnusableError([f"inputs: {pixels:,} pixels to decode, at most {MAX_REQUEST:,} are taken at once"])
        with self.let_in(pixels), ThreadPoolExecutor(min(os.cpu_count() or 1, len(contents) or 1)) as pool:
            found = list(pool.map(self.decode, contents))
        if reasons := [f"inputs[{i}]: {reason}" for i, reason in enumerate(found) if isinstance(reason, str)]:
            raise UnusableError(reasons)
        return self.classify([pixels for pixels in found if not isinstance(pixels, str)])

    @contextmanager
    def let_in(self, pixels: int) -> Iterator[None]:
        """Lets one large request decode at a time, and a small one at once; raises MlflowException for too many."""
        if pixels <= LARGE_REQUEST:
            yield
            return
        with self.counting:
            if len(self.large) == LARGE_AT_ONCE or sum(self.large) + pixels > MAX_REQUEST:
                told = "other large requests are under way: send fewer or smaller images, or try again later"
                raise MlflowException(told, error_code=TEMPORARILY_UNAVAILABLE)  # HTTP 503
            self.large.append(pixels)
        try:
            with self.decoding:
                yield
        finally:
            self.large.remove(pixels)

    def decode(self, content: bytes | str) -> np.ndarray | str:
        """The pixels of an image file, or the reason why there are none."""
        try:
            return content if isinstance(content, str) else read_image(content, self.image_size)
        except ValueError as error:
            return str(error)

    def compare(self, pixels):
        """Return for a batch the probabilities, the nearest training images, the similarities to these, the novelty."""
        import tensorflow as tf

        backbone, *head = self.model.layers
        features = probabilities = backbone(pixels, training=False)
        for layer in head:
            probabilities = layer(probabilities, training=False)
        units = tf.math.l2_normalize(features, axis=1)
        similarities = tf.linalg.matmul(units, self.references, transpose_b=True)
        novelty = 1 - self.compute_familiarity(units) * tf.sqrt(tf.reduce_max(probabilities, axis=1))
        nearest = tf.argmax(similarities, axis=1)
        return [probabilities, nearest, tf.minimum(tf.reduce_max(similarities, axis=1), 1.0), novelty]

    def compute_familiarity(self, units):
        """Return for a batch of features the largest cosine of Whitening.compare(), computed by TensorFlow."""
        import tensorflow as tf

        center, scatter, references = self.whitening
        centered = units - center
        lengths = tf.reduce_sum(centered**2, axis=1) - tf.reduce_sum(tf.linalg.matmul(centered, scatter) ** 2, axis=1)
        return tf.reduce_max(tf.linalg.matmul(centered, references, transpose_b=True), axis=1) / tf.sqrt(lengths)

    def classify(self, images: list[np.ndarray]) -> list[Answer]:
        """The answer to each image as read_image() gives it."""
        answers = []
        for start in range(0, len(images), BATCH):
            outputs = self.call(np.stack(images[start : start + BATCH]))
            for row, *nearest in zip(*(one.numpy().tolist() for one in outputs), strict=True):
                probabilities = dict(zip(self.class_names, row, strict=True))
                label = max(probabilities, key=probabilities.__getitem__)
                answer = Answer(label=label, probability=probabilities[label], probabilities=probabilities)
                if nearest:
                    number, answer.similarity, novelty = nearest
                    answer.nearest = self.files[number]
                    answer.unknown = None if np.isnan(self.max_novelty) else novelty > self.max_novelty
                if self.unsure_below is not None:
                    answer.unsure = answer.probability < self.unsure_below
                answers.append(answer)
        return answers


def check_types(predict):
    """predict() with a short error for what is no list of strings; MLflow's would send the whole request back."""

    @functools.wraps(predict)
    def checked(self, model_input):
        if isinstance(model_input, dict | str | int | float | None):
            raise UnusableError(["inputs: not a list of images in base64"])
        items = model_input if type(model_input) is list else []
        if wrong := [i for i, item in enumerate(items) if not isinstance(item, str)]:
            raise UnusableError([f"inputs[{i}]: not a string in base64" for i in wrong])
        return predict(self, model_input)

    return checked


# Before MLflow's own check, which is inside by now.
ImageClassifier.predict = check_types(ImageClassifier.predict)  # type: ignore[method-assign]
mlflow.models.set_model(ImageClassifier())  # what MLflow takes from this file when it is a model's code
