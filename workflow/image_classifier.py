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
import ctypes
import functools
import io
import logging
import math
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlflow
import numpy as np
import PIL
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    STRIPOFFSETS,
    TILELENGTH,
    TILEOFFSETS,
    TILEWIDTH,
    TiffImageFile,
)
from pydantic import BaseModel

if TYPE_CHECKING:
    from mlflow.pyfunc import PythonModel, PythonModelContext
else:
    try:
        from mlflow.pyfunc import PythonModel
    except ImportError:  # without pandas, MLflow cannot serve a model, but the rest of this file works
        PythonModel = object

# Detected by content, not by file extension. HEIF is added if the package is installed.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
HEIC_PACKAGE = "pi-heif==1.4.0"
MAX_PIXELS = 50_000_000  # an image that costs more to decode may be a decompression bomb; see open_image()
MIN_SIDE = 8  # pixels: a narrower image costs as much as one of this width or height
COSTLY_SCANS = 100  # scans of a progressive JPEG file take as long to decode as a PNG file with as many pixels
RUN_LENGTH_ENCODINGS = (1, 2)  # of BMP files
MAX_SEGMENTS = 10_000  # of a JPEG file before its first scan
MAX_HEADER_READS, MAX_READS = 5000, 1_000_000  # parts of a file that Pillow reads one by one: 20,000 took 0.1 s
MAX_PROFILES = 10  # of a PNG file, which are decompressed: 2,000 took 1.2 s
MAX_STRIPS = 100_000  # of a TIFF file
MAX_METADATA_BYTES = 20_000  # of an AVIF file; its decoder needs 0.2 s for that many, and 35 s for 100,000
TOO_MANY_PARTS = "the file has too many parts; save the image again"
MAX_BOXES = 1000  # before the metadata of an AVIF file, or in it
MAX_AV1_UNITS = 10_000  # headers and frames in an AVIF file
USUAL_SIZE = 336  # pixels: width and height of the images for which count_pixels() computes the cost
READING_VERSION = 2  # increase when read_image() returns different pixels, so that cached features are recomputed
JPEG_QUALITY = 85
BATCH_SIZE = 16  # images; larger batches are no faster and need much more memory
MAX_IMAGES = 2_000  # per request
MAX_REQUEST_PIXELS = 300_000_000  # to decode per request, and in total for the large requests in progress
LARGE_REQUEST_PIXELS = 10_000_000  # requests with more pixels are decoded one at a time
MAX_LARGE_REQUESTS = 4  # in progress; MLflow's server has four more threads than the machine has cores
SHRINKAGE = 2.0  # added to the diagonal of the within-class covariance, in units of its mean eigenvalue
MIN_VARIANCE = 1e-3  # lower bound of the variance within classes, for nearly identical images


def silence_decoders() -> None:
    """Stop Pillow and libtiff from printing lines that do not name the file; read_image() raises errors instead."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for pattern in ("../pillow.libs/libtiff*", ".dylibs/libtiff*"):  # in Pillow's wheels for Linux and macOS
        for library in Path(PIL.__path__[0]).glob(pattern):
            set_handler = ctypes.CDLL(str(library)).TIFFSetErrorHandler
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


silence_decoders()
Image.MAX_IMAGE_PIXELS = None  # open_image() limits the cost instead: large JPEG files are decoded at a reduced scale
with suppress(ImportError):
    from pi_heif import register_heif_opener

    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    FORMATS += ("HEIF",)


def read_image(source: Path | bytes, size: int) -> np.ndarray:
    """Return the first frame of an image, upright, in RGB and resized to a square: uint8, shape (size, size, 3).

    Raises:
        ValueError: the image is unusable; the message is the reason
    """
    content = b""
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        with open_image(content, size)[0] as image:
            return np.asarray(resize_to_rgb(image, size))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image: {explain_unidentified(content)}") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except (SyntaxError, LookupError, TypeError, ArithmeticError, RuntimeError, EOFError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"damaged: {reason}") from None  # Pillow's decoders raise these for malformed files


class CountedReads(io.BytesIO):
    """An image file with a limit on the number of its parts, because Pillow loops over them in Python."""

    reads_left = MAX_HEADER_READS

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError(TOO_MANY_PARTS)
        return super().read(size)


def open_image(content: bytes, size: int) -> tuple[ImageFile, int]:
    """Open an image that will be resized to a square, and compute the cost of decoding it.

    The cost is the number of pixels of a PNG file that takes about as much memory and time.

    Raises:
        ValueError: the cost is too high
    """
    av1_pixels, start = 0, int.from_bytes(content[:4])
    if content[4:8] == b"ftyp" and b"avi" in content[8:start]:
        # Pillow reads the tracks of an animation; without these brands, it reads the image that is checked here.
        content = content[:8] + b"avif" + content[12:start].replace(b"avis", b"avif") + content[start:]
        av1_pixels = count_av1_pixels(content)
    tags = list_tags(content) if content[:2] in (b"II", b"MM") else []
    strips = max((count for tag, count in tags if tag in (STRIPOFFSETS, TILEOFFSETS)), default=0)
    if strips > MAX_STRIPS or content.count(b"iCCP") > MAX_PROFILES:
        raise ValueError(TOO_MANY_PARTS)
    file = CountedReads(content)
    image = Image.open(file, formats=FORMATS)
    file.reads_left = MAX_READS
    width, height = image.size
    image.draft("RGB", (2 * size, 2 * size))  # decode JPEG at a reduced scale
    cost = max(max(image.width, MIN_SIDE) * max(image.height, MIN_SIDE), av1_pixels)
    if isinstance(image, JpegImageFile):  # or MPO, which is JPEG followed by further images
        cost = max(cost, int(width * height * cost_per_pixel(image, content)))
    elif isinstance(image, TiffImageFile):
        cost = max(cost, count_tile_pixels(image, [tag for tag, _ in tags]))
        check_samples(image)
    elif image.format == "BMP" and image.info["compression"] in RUN_LENGTH_ENCODINGS:
        cost *= 5  # Pillow decodes them in Python
    if cost >= MAX_PIXELS:
        as_many = "" if cost == width * height else f", which take as long to decode as {cost:,}"
        raise ValueError(f"{width} x {height} pixels{as_many} (must be fewer than {MAX_PIXELS:,}: save a smaller copy)")
    return image, cost


def cost_per_pixel(image: JpegImageFile, content: bytes) -> float:
    """Return the cost of decoding a pixel of a JPEG file.

    An image with a single scan is decoded in rows, at a reduced scale. Otherwise, all coefficients are kept in memory,
    2 bytes each, where a pixel of a PNG file takes 10; and each scan may change all of them.
    """
    if has_single_scan(content):
        return 1 / 8
    areas = [horizontal * vertical for _, horizontal, vertical, _ in image.layer]
    return max(sum(areas) / max(areas) * 2 / 10, content.count(b"\xff\xda") / COSTLY_SCANS)


def has_single_scan(content: bytes) -> bool:
    """Return whether a JPEG file is sequential and its first scan has all components, so that no other is decoded."""
    position, components = 2, 0
    for _ in range(MAX_SEGMENTS):
        start, marker, length = struct.unpack_from(">BBH", content, position)
        if marker in (0xC0, 0xC1):  # the header of a sequential image
            components = content[position + 9]
        if start != 0xFF or marker == 0xDA:  # start of a scan
            return start == 0xFF and content[position + 4] == components
        position += 2 + length
    return False


def list_tags(content: bytes) -> list[tuple[int, int]]:
    """Return the tags of the first image of a TIFF file, and how many values each has."""
    order, is_big = "<" if content[:1] == b"I" else ">", 43 in content[2:4]
    try:
        (position,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", content, 8 if is_big else 4)
        (entries,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", content, position)
        position, length = (position + 8, 20) if is_big else (position + 2, 12)
        entry = struct.Struct(f"{order}H2x{'Q' if is_big else 'I'}")
        return [entry.unpack_from(content, position + length * number) for number in range(entries)]
    except struct.error:
        raise ValueError("damaged: the file is truncated") from None


def count_tile_pixels(image: TiffImageFile, tags: list[int]) -> int:
    """Return the number of pixels in all tiles of a TIFF file; a single tile may be larger than the image.

    Raises:
        ValueError: a tag is repeated, so libtiff and Pillow may use different values
    """
    pixels = 1
    for side, tile in ((IMAGEWIDTH, TILEWIDTH), (IMAGELENGTH, TILELENGTH)):
        step = image.tag_v2.get(tile, image.tag_v2[side])
        if tags.count(tile) != (tile in image.tag_v2) or not isinstance(step, int) or step < 1:
            raise ValueError("damaged: ambiguous tile size")
        pixels *= -(-image.tag_v2[side] // step) * step
    return pixels


def check_samples(image: TiffImageFile) -> None:
    """Raise ValueError for a TIFF file whose values Pillow (13) misreads without an error."""
    bits, formats = image.tag_v2.get(BITSPERSAMPLE, (1,)), image.tag_v2.get(SAMPLEFORMAT, (1,))
    is_planar = len(bits) > 1 and image.tag_v2.get(PLANAR_CONFIGURATION) == 2
    if (max(bits) == 16 and is_planar) or (max(bits) == 8 and 2 in formats):
        kind = "signed values" if 2 in formats else "16-bit colors in separate planes"
        raise ValueError(f"{kind} are not supported; save it with 8 bits per channel")


def count_av1_pixels(content: bytes) -> int:
    """Return the number of pixels of all frames in an AVIF file, because the size in its header may be wrong.

    Raises:
        ValueError: the file has more parts than an image needs
    """
    pixels = area = 0
    units = (unit for item in list_items(memoryview(content)) for unit in list_units(item))
    for number, (kind, unit) in enumerate(units):
        if number == MAX_AV1_UNITS:
            raise ValueError(TOO_MANY_PARTS)
        if kind == 1:  # a sequence header
            area = read_area(unit)
        elif kind in (3, 6):  # a frame
            pixels += area
    return pixels


def list_boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and content of each box: of an AVIF file up to its metadata, or of the metadata."""
    for _ in range(MAX_BOXES):
        size, kind = int.from_bytes(content[:4]) or len(content), bytes(content[4:8])
        yield kind, content[8:size]
        content = content[size:]
        if kind == b"meta" or size < 8 or len(content) < 8:
            return


def list_items(content: memoryview) -> Iterator[memoryview]:
    """Yield the data of each item in an AVIF file. EXIF and XMP are items, too; list_units() finds no frame in them."""
    metadata = memoryview(b"")
    for kind, metadata in list_boxes(content):
        if kind in (b"meta", b"moov") and len(metadata) > MAX_METADATA_BYTES:
            raise ValueError(TOO_MANY_PARTS)
    boxes = dict(list_boxes(metadata[4:]))
    read = make_reader(boxes[b"iloc"])
    version, _, offset_bits, size_bits, base_bits, index_bits = read(8), read(24), *(8 * read(4) for _ in range(4))
    id_bits = 32 if version == 2 else 16
    for _ in range(min(read(id_bits), len(metadata))):
        _, method, _, start, parts = read(id_bits), version and read(16), read(16), read(base_bits), read(16)
        if parts != 1:
            raise ValueError(TOO_MANY_PARTS)
        read(version and index_bits)
        start += read(offset_bits)
        yield (boxes[b"idat"] if method == 1 else content)[start:][: read(size_bits) or None]


def list_units(item: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the type and content of each unit of AV1 data (section 5.3 of its specification)."""
    while item:
        header, item = item[0], item[2 if item[0] & 4 else 1 :]
        size = len(item)
        if header & 2:
            length = next(number for number in range(8) if item[number] < 128) + 1
            size = sum((byte & 127) << 7 * number for number, byte in enumerate(item[:length]))
            item = item[length:]
        yield header >> 3 & 15, item[:size]
        item = item[size:]


def read_area(header: memoryview) -> int:
    """Return the number of pixels in a frame, from an AV1 sequence header (section 5.5).

    Frames of an animation may be larger than the header states, up to the limit that the lengths of its fields imply.
    A quarter of that limit is the minimum here: an honest header states more, because encoders use the shortest fields.
    """
    read = make_reader(header[:200])
    _, is_still = read(4), read(1)
    has_timing, has_delay = (0, 0) if is_still else (read(1), read(1))
    if has_timing:
        raise ValueError("AV1 with timing information is not supported; save it as JPEG")
    for _ in range(1 if is_still else read(5) + 1):
        read(0 if is_still else 12)
        if read(5) > 7 and not is_still:
            read(1)
        if has_delay and read(1):
            read(4)
    width_bits, height_bits = read(4) + 1, read(4) + 1
    area = (read(width_bits) + 1) * (read(height_bits) + 1)
    return area if is_still else max(area, 1 << width_bits + height_bits >> 2)


def make_reader(data: memoryview) -> Callable[[int], int]:
    """Return a function that returns the next bits of data as a number."""
    bits = io.StringIO("".join(f"{byte:08b}" for byte in data))
    return lambda size: int(bits.read(size) or "0", 2)


def explain_unidentified(content: bytes) -> str:
    """Return why Pillow does not recognize a file as an image."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"):
        return "damaged HEIC" if "HEIF" in FORMATS else f"HEIC needs {HEIC_PACKAGE}: run `pip install {HEIC_PACKAGE}`"
    if content[:4] in (b"II*\0", b"MM\0*"):
        return "damaged, or a TIFF file with unsupported values; save it with 8 bits per channel"
    return "unknown format" if content else "the file is empty"


def resize_to_rgb(image: ImageFile, side: int, keep_aspect: bool = False) -> Image.Image:
    """Return an image upright, in 8-bit RGB, on a white background, and resized to a square or to this longer side.

    Raises:
        ValueError: values are not finite, or use so little of their range that 8 bits lose most detail
    """
    has_16_bits, is_inverted, is_unsigned = ";16" in str(image.tile[:1]), False, False
    if isinstance(image, TiffImageFile):
        is_inverted = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0  # Pillow inverts 8-bit images only
        is_unsigned = image.tag_v2.get(SAMPLEFORMAT, (1,)) == (1,)  # Pillow reads 32 bits as signed values
    apply_orientation(image)
    scale = side / max(image.size)
    size = (side, side)
    if keep_aspect:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if image.mode.startswith(("I", "F")):
        if is_unsigned and image.mode == "I" and np.min(image.getextrema()) < 0:
            raise ValueError("values above 2,147,483,647 are not supported; save it with 16 bits")
        values = np.asarray(image.convert("F").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0), "float64")
        return Image.fromarray(scale_to_8_bits(-values if is_inverted else values)).convert("RGB")
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    source = image if image.mode == mode else image.convert(mode)  # a copy of a large image takes 200 MB
    resized = source.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if resized.mode == "L":
        resized = resized.convert("RGB")
    if has_16_bits and 0 < np.asarray(resized)[..., :3].max() < 64:  # Pillow reads 8 of the 16 bits
        raise ValueError("its 16-bit colors use less than a quarter of their range; save it with 8 bits per channel")
    if resized.mode == "RGBA":
        resized = Image.alpha_composite(Image.new("RGBA", size, "white"), resized)
    return resized.convert("RGB")


def apply_orientation(image: Image.Image) -> None:
    """Rotate an image in place according to its EXIF data; leave it unchanged if the EXIF data are damaged."""
    image.load()
    with suppress(Exception):  # Pillow (13) raises exceptions of many types for damaged EXIF data
        ImageOps.exif_transpose(image, in_place=True)


def scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit, 32-bit or floating-point gray values by the image's own range, whatever their unit.

    Black and white are the 0.5th and 99.5th percentiles, so that a few hot pixels do not matter.
    """
    if not np.isfinite(values).all():
        raise ValueError("some of its values are not finite; replace them")
    low, high = np.percentile(values, (0.5, 99.5))
    if low == high:
        low, high = values.min(), values.max()
    return (np.clip((values - low) / max(high - low, np.finfo("float32").tiny), 0, 1) * 255).round().astype("uint8")


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
    """Return the cost of decoding an image file (see open_image()); 0 if it is unusable, which costs little."""
    try:
        return open_image(content if isinstance(content, bytes) else b"", USUAL_SIZE)[1]
    except Exception:  # read_image() reports the reason
        return 0


class Whitening(NamedTuple):
    """A whitening transform of features, from their within-class covariance, and the whitened reference embeddings.

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
        whitening: None for a version 1.0 model, whose novelty was 1 - similarity
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
            UnusableError: images are unusable, or the request is too large; the message lists all reasons
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
