"""Read images safely, and serve a model with MLflow: images in, predictions out.

Training and serving both read images with read_image(). MLflow packages this file with every model, so it imports
nothing from the project.

A request is {"inputs": [base64-encoded image file, ...]} with at most MAX_IMAGES images. The prediction for an image is

    {"label": "oranges", "probability": 0.98, "probabilities": {"apples": 0.02, "oranges": 0.98},
     "similarity": 0.81, "unknown": false, "nearest": "oranges/orange-3.jpeg", "unsure": false}

`nearest` is the most similar training image, and `similarity` its cosine similarity to the image. `unknown` is true
when the image is more novel than 95% of held-out training images: it probably shows none of the classes, so ignore the
label. `unsure` is true when the probability is below a threshold at or above which 95% of the predictions were correct
in cross-validation. These fields are null when the model has no backbone, or when cross-validation could not determine
the threshold.

A request with unusable images returns status 400 with the reason for each, such as "inputs[3]: not an image: unknown
format". MLflow's server returns 504 for a request that takes longer than 60 s (MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT),
and 500 for one without Content-Type.

From Python: mlflow.pyfunc.load_model("models:/apples-oranges@champion").predict(images). The Keras model alone is the
artifact models:/apples-oranges@champion/artifacts/model.keras, which Keras loads in safe mode.
"""

import base64
import functools
import io
import math
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlflow
import numpy as np
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from PIL import Image, ImageOps
from pydantic import BaseModel

if TYPE_CHECKING:
    from mlflow.pyfunc import PythonModel, PythonModelContext
else:
    try:
        from mlflow.pyfunc import PythonModel
    except ImportError:  # without pandas, MLflow cannot serve a model, but the rest of this file works
        PythonModel = object

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # detected by content, not by file extension
MAX_PIXELS = 50_000_000  # an image with this many may be a decompression bomb
READING_VERSION = 1  # increase when read_image() returns different pixels, so that cached features are recomputed
JPEG_QUALITY = 85
BATCH_SIZE = 16  # images; larger batches are no faster and need much more memory
MAX_IMAGES = 2_000  # per request
MAX_REQUEST_PIXELS = 300_000_000  # to decode per request, and in total for the large requests in progress
LARGE_REQUEST_PIXELS = 10_000_000  # requests with more pixels are decoded one at a time
MAX_LARGE_REQUESTS = 4  # in progress; MLflow's server has four more threads than the machine has cores
SHRINKAGE = 2.0  # added to the diagonal of the within-class covariance, in units of its mean eigenvalue
MIN_VARIANCE = 1e-3  # lower bound of the variance within classes, for nearly identical images


def read_image(source: Path | bytes, size: int) -> np.ndarray:
    """Return the first frame of an image, upright, in RGB and resized to a square: uint8, shape (size, size, 3).

    Raises:
        ValueError: the image is unusable; the message is the reason
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height >= MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels (must be fewer than {MAX_PIXELS:,})")
            image.draft("RGB", (2 * size, 2 * size))  # decode JPEG at a reduced scale
            upright = convert_to_rgb(apply_orientation(image))
            return np.asarray(blend_on_white(upright.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image: {explain_unidentified(source)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"too many pixels (must be fewer than {MAX_PIXELS:,})") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (SyntaxError, LookupError, TypeError, ArithmeticError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"damaged: {error}") from None  # Pillow's decoders raise these for malformed files


def explain_unidentified(source: Path | bytes) -> str:
    """Return why Pillow does not recognize a file as an image."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC is not supported: export the photo as JPEG"
    return "unknown format" if start else "the file is empty"


def apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate an image according to its EXIF data; return it unchanged if the EXIF data are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, struct.error):
        return image


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB, or to RGBA if it has transparency."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, "uint16") >> 8).astype("uint8"))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def blend_on_white(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, on a white background if it has transparency."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Return uint8 pixels (height, width, 3) as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def decode_base64(text: str) -> bytes | str:
    """Return the decoded bytes, or the reason why the text is not base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        return f"not base64: {error}"


def count_pixels(content: bytes | str) -> int:
    """Return how many pixels of an image file must be decoded, according to its header; 0 if it is unreadable."""
    try:
        with Image.open(io.BytesIO(content if isinstance(content, bytes) else b""), formats=FORMATS) as image:
            # JPEG is decoded at a reduced scale.
            scale = 1 if image.format != "JPEG" else 2 if "progressive" in image.info else 8
            return image.width * image.height // scale
    except Exception:  # read_image() reports the reason
        return 0


class Whitening(NamedTuple):
    """A whitening of features by their within-class covariance, and the whitened reference embeddings.

    The shrunk covariance is a multiple of the identity plus a term whose rank is at most the number of references, so
    inverting it only requires inverting a matrix of that size (Woodbury, 1950). Up to a factor, the squared length of
    the whitened features x is |x - center|^2 - |(x - center) @ scatter|^2.

    Attributes:
        center: mean of the class means, shrunk toward the origin, shape (n,)
        scatter: factor of the low-rank term, shape (n, references)
        reference_embeddings: shape (references, n), scaled so that the product with centered features is the cosine
            similarity times the length of the whitened features
    """

    center: np.ndarray
    scatter: np.ndarray
    reference_embeddings: np.ndarray

    def compare(self, features):
        """Return the cosine similarity (images, references) of the whitened features; accept arrays or Keras tensors.

        The features (images, n) are L2-normalized.
        """
        from keras import ops

        centered = features - self.center
        lengths = ops.sum(centered**2, axis=1) - ops.sum(ops.matmul(centered, self.scatter) ** 2, axis=1)
        return ops.matmul(centered, self.reference_embeddings.T) / ops.sqrt(lengths)[:, None]


def fit_whitening(embeddings: np.ndarray, labels: np.ndarray, dimensions: int) -> Whitening:
    """Fit a whitening to the within-class covariance of the reference embeddings.

    Args:
        embeddings: L2-normalized features, shape (references, n)
        labels: label of each reference, shape (references,)
        dimensions: size of a feature vector; n is smaller if the embeddings are expressed in a basis of their span
    """
    classes, labels = np.unique(labels, return_inverse=True)
    means = np.stack([embeddings[labels == label].mean(axis=0) for label in range(len(classes))])
    residuals = embeddings - means[labels]
    degrees_of_freedom = max(len(embeddings) - len(classes), 1)
    spread = max((residuals**2).sum(), degrees_of_freedom * MIN_VARIANCE)
    gram = residuals @ residuals.T + np.eye(len(embeddings)) * SHRINKAGE * spread / dimensions
    scatter = residuals.T @ np.linalg.inv(np.linalg.cholesky(gram)).T
    center = means.mean(axis=0) * len(classes) / (len(classes) + 1)  # shrunk toward the origin, more for few classes
    centered = embeddings - center
    whitened = centered - centered @ scatter @ scatter.T
    whitened /= np.sqrt((centered * whitened).sum(axis=1, keepdims=True))
    return Whitening(*(array.astype(embeddings.dtype) for array in (center, scatter, whitened)))


def predict_batch(model, reference_embeddings: np.ndarray | None, whitening: Whitening | None, pixels):
    """Predict the classes of a batch of images and, given reference embeddings, compare the images with them.

    Args:
        model: a Keras model; given reference embeddings, its first layer is the backbone
        reference_embeddings: L2-normalized features, shape (references, n)
        whitening: None for a model of version 1.0, whose novelty was 1 - similarity
        pixels: uint8 tensor of shape (images, height, width, 3), or a symbolic one

    Returns:
        The probabilities and, given reference embeddings, the similarity to the nearest reference, the novelty, and the
        index of the nearest reference.
    """
    from keras import ops

    if reference_embeddings is None:
        return [model(pixels, training=False)]
    backbone, *head = model.layers
    features = probabilities = backbone(pixels, training=False)
    for layer in head:
        probabilities = layer(probabilities, training=False)
    embeddings = ops.normalize(features, axis=1)
    similarities = ops.matmul(embeddings, reference_embeddings.T)
    similarity, nearest = (values[:, 0] for values in ops.top_k(similarities, 1))  # LiteRT cannot run Keras's argmax
    similarity = ops.minimum(similarity, 1.0)
    novelty = 1 - similarity
    if whitening:
        novelty = 1 - ops.max(whitening.compare(embeddings), axis=1) * ops.sqrt(ops.max(probabilities, axis=1))
    return [probabilities, similarity, novelty, nearest]


class ImagePrediction(BaseModel):
    """The prediction for an image; the labels are the names of the class folders."""

    label: str
    probability: float
    probabilities: dict[str, float]
    similarity: float | None = None  # to the nearest training image, -1 to 1
    unknown: bool | None = None  # whether the image probably shows none of the classes
    nearest: str | None = None  # file name of the nearest training image
    unsure: bool | None = None  # whether the probability is too low to trust the label


class UnusableError(MlflowException):
    """A request whose images are unusable, with the reason for each; HTTP status 400."""

    def __init__(self, reasons: list[str]):
        super().__init__("; ".join(reasons), error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        self.message = str(self)  # MLflow has prepended the whole request, including all images
        return super().serialize_as_json()


class Classifier:
    """Read images and classify them. A subclass computes the outputs of its network and sets the attributes.

    Attributes:
        class_names: in the order of the network's outputs
        image_size: width and height of the network's input, in pixels
        unsure_below: predictions with a lower probability are unsure; None without such a threshold
        max_novelty: images with a higher novelty are unknown; NaN without such a threshold
        files: names of the training images whose features are the reference embeddings
    """

    class_names: list[str]
    image_size: int
    unsure_below: float | None = None
    max_novelty: float = math.nan
    files: Sequence[str] = ()

    def predict_batch(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Return what the function predict_batch() returns, as arrays, for pixels (images, height, width, 3)."""
        raise NotImplementedError

    def decode(self, content: bytes | str) -> np.ndarray | str:
        """Return the pixels of an image file, or the reason why it is unusable."""
        try:
            return content if isinstance(content, str) else read_image(content, self.image_size)
        except ValueError as error:
            return str(error)

    def classify(self, images: list[np.ndarray]) -> list[ImagePrediction]:
        """Return the prediction for each image that read_image() returned."""
        predictions = []
        for start in range(0, len(images), BATCH_SIZE):
            outputs = self.predict_batch(np.stack(images[start : start + BATCH_SIZE]))
            for row, *rest in zip(*(output.tolist() for output in outputs), strict=True):
                probabilities = dict(zip(self.class_names, row, strict=True))
                label = max(probabilities, key=probabilities.__getitem__)
                prediction = ImagePrediction(label=label, probability=probabilities[label], probabilities=probabilities)
                if rest:
                    prediction.similarity, novelty, nearest = rest
                    prediction.nearest = self.files[nearest]
                    prediction.unknown = None if math.isnan(self.max_novelty) else novelty > self.max_novelty
                if self.unsure_below is not None:
                    prediction.unsure = prediction.probability < self.unsure_below
                predictions.append(prediction)
        return predictions


class ImageClassifier(Classifier, PythonModel):
    """The model that MLflow serves: base64-encoded images in, predictions out. `model` is the Keras model."""

    def load_context(self, context: "PythonModelContext") -> None:
        import keras
        import tensorflow as tf

        self.class_names, self.image_size = context.model_config["class_names"], context.model_config["image_size"]
        self.unsure_below = context.model_config.get("unsure_below")
        self.model = keras.saving.load_model(context.artifacts["model"])
        self.reference_embeddings = self.whitening = None
        if "reference_embeddings" in context.artifacts:
            with np.load(context.artifacts["reference_embeddings"]) as saved:
                self.files, self.max_novelty = saved["files"].tolist(), float(saved["max_novelty"])
                self.reference_embeddings = embeddings = saved["features"].astype("float32")
                self.whitening = fit_whitening(embeddings, saved["labels"], embeddings.shape[1])
        function = functools.partial(predict_batch, self.model, self.reference_embeddings, self.whitening)
        pixels = tf.TensorSpec((None, self.image_size, self.image_size, 3), tf.uint8)
        self.network = tf.function(function, [pixels], autograph=False)
        self.large: list[int] = []  # pixels of the large requests in progress
        self.admitting, self.decoding = threading.Lock(), threading.Lock()

    def predict_batch(self, pixels: np.ndarray) -> list[np.ndarray]:
        return [output.numpy() for output in self.network(pixels)]

    # MLflow accepts a predict() without a context, but its type hints do not.
    def predict(self, model_input: list[str]) -> list[ImagePrediction]:  # type: ignore[override]
        """Return the prediction for each image.

        Raises:
            UnusableError: images are unusable, or the request is too large; the message has all reasons
            MlflowException: too many large requests are in progress
        """
        if len(model_input) > MAX_IMAGES:
            raise UnusableError([f"inputs: {len(model_input):,} images; send at most {MAX_IMAGES:,}"])
        contents = list(map(decode_base64, model_input))
        if (pixels := sum(map(count_pixels, contents))) > MAX_REQUEST_PIXELS:
            raise UnusableError([f"inputs: {pixels:,} pixels to decode; send at most {MAX_REQUEST_PIXELS:,}"])
        with self.admit(pixels), ThreadPoolExecutor(min(os.cpu_count() or 1, len(contents) or 1)) as pool:
            images = list(pool.map(self.decode, contents))
        if reasons := [f"inputs[{i}]: {reason}" for i, reason in enumerate(images) if isinstance(reason, str)]:
            raise UnusableError(reasons)
        return self.classify([image for image in images if not isinstance(image, str)])

    @contextmanager
    def admit(self, pixels: int) -> Iterator[None]:
        """Run the block at once for a small request; queue a large one, or reject it if too many are in progress."""
        if pixels <= LARGE_REQUEST_PIXELS:
            yield
            return
        with self.admitting:
            if len(self.large) == MAX_LARGE_REQUESTS or sum(self.large) + pixels > MAX_REQUEST_PIXELS:
                message = "too many large requests in progress; send fewer or smaller images, or retry later"
                raise MlflowException(message, error_code=TEMPORARILY_UNAVAILABLE)  # HTTP 503
            self.large.append(pixels)
        try:
            with self.decoding:
                yield
        finally:
            self.large.remove(pixels)


def check_types(predict):
    """Check the request before predict(), with short error messages; MLflow's would repeat the whole request."""

    @functools.wraps(predict)
    def checked(self, model_input):
        if isinstance(model_input, dict | str | int | float | None):
            raise UnusableError(["inputs: not a list of base64-encoded images"])
        items = model_input if type(model_input) is list else []
        if invalid := [i for i, item in enumerate(items) if not isinstance(item, str)]:
            raise UnusableError([f"inputs[{i}]: not a base64-encoded string" for i in invalid])
        return predict(self, model_input)

    return checked


# MLflow has already wrapped predict() in its own check, so this check runs first.
ImageClassifier.predict = check_types(ImageClassifier.predict)  # type: ignore[method-assign]
with suppress(ImportError):  # without pandas, see above
    mlflow.models.set_model(ImageClassifier())  # the object that MLflow loads from this file
