"""The features of the images in a folder, computed once and cached.

The cache is a folder of files with the features of up to MAX_CHUNK_IMAGES images each. Its name depends on the version
of everything that affects features. Damaged files are deleted and recomputed. Unusable images are not cached.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from multiprocessing.pool import ThreadPool  # its threads end with the call
from pathlib import Path
from typing import NamedTuple

from workflow.data import exif
from workflow.data.exif import Capture, read_capture
from workflow.files import file_size, group, read_file, read_verified, sha256, write_arrays
from workflow.image_classifier import READING_VERSION, read_image
from workflow.model import backbone, backbone_weights
from workflow.model.backbone import IMAGE_SIZE
from workflow.records import ImageFile

import numpy as np
import PIL
from PIL import Image

VERSION = 3  # increase when thumbnails or the arrays in the cache change
THUMBNAIL = 48  # width and height of the grayscale image that near_duplicates.py compares; a divisor of IMAGE_SIZE
MAX_CHUNK_IMAGES = 64  # images per task; they are computed again if the worker's process dies
MAX_CHUNK_BYTES = 8_000_000  # size of the image files per task, because they may be sent to a worker
Item = tuple[str, Path | bytes]  # the digest of an image, and its file or content


class Unusable(NamedTuple):
    """The reason why an image is unusable; a reason that is not permanent may no longer apply in the next run."""

    reason: str
    is_permanent: bool = True


class FeatureRow(NamedTuple):
    """The cached values of a usable image."""

    features: np.ndarray  # float32 of shape (FEATURES,)
    thumbnail: np.ndarray  # uint8 of shape (THUMBNAIL, THUMBNAIL)
    capture: Capture  # camera and time
    since: int = 0  # when the image was first seen, ns since 1970
    is_blank: bool = False  # whether it has only one color


Results = Mapping[str, FeatureRow | Unusable]  # by the digest of the image


class Workers(NamedTuple):
    """Workers that compute the features of chunks of images."""

    executor: Executor
    max_tasks: int  # submitted to the executor at the same time
    is_remote: bool  # whether to send the content of image files, because workers may not have access to the files


def load_features(
    images: list[ImageFile],
    folder: Path,
    cache: Path,
    workers: contextlib.AbstractContextManager[Workers],
    progress: Callable[[int, int], None],
) -> tuple[list[ImageFile], dict[str, FeatureRow]]:
    """Load the features of images from the cache, and compute those that are missing.

    Args:
        images: the images of the folder; images that already have a `reason` to be skipped are ignored
        folder: contains the image files
        cache: the parent folder of the cache
        workers: context manager of the workers, entered only if features are missing
        progress: called after each chunk except the last, with the number of finished images and the total

    Returns:
        The images, with a `reason` for each unusable one, and the features of the usable images by digest.
    """
    store = store_folder(cache)
    paths = {image.digest: image.path_in(folder) for image in images if not image.reason}
    rows, reasons = read_store(store, paths), dict[str, Unusable]()
    if missing := [item for item in paths.items() if item[0] not in rows]:
        done = 0
        with workers as pool:
            for chunk in compute_chunks(missing, pool):
                usable = {digest: row for digest, row in chunk.items() if isinstance(row, FeatureRow)}
                write_rows(store, usable)
                rows |= usable
                reasons |= {digest: row for digest, row in chunk.items() if isinstance(row, Unusable)}
                done += len(chunk)
                if done < len(missing):
                    progress(done, len(missing))
    unusable = {image.file: reasons[image.digest] for image in images if not image.reason and image.digest in reasons}
    return [image.with_reason(*unusable.get(image.file, (image.reason,))) for image in images], rows


def features_key() -> str:
    """Return a key that changes whenever the features of the same image may change."""
    versions = READING_VERSION, exif.VERSION, backbone.FEATURES_VERSION, VERSION
    return sha256([backbone_weights.DIGEST, PIL.__version__, *versions])[:12]


def store_folder(cache: Path) -> Path:
    """Return the folder of the cache for the current versions."""
    return cache / f"features-{backbone.NAME}-{features_key()}"


def read_store(store: Path, wanted: Container[str]) -> dict[str, FeatureRow]:
    """Return the cached rows of the wanted digests."""
    rows: dict[str, FeatureRow] = {}
    for path in sorted(store.glob("*.npz")):
        try:
            with open(path, "rb") as file, np.load(file) as saved:
                digests = saved["digests"].tolist()
                if any(digest in wanted for digest in digests):
                    captures = map(Capture, saved["cameras"].tolist(), saved["times"].tolist())
                    columns = (
                        saved["features"],
                        saved["thumbnails"],
                        captures,
                        saved["since"].tolist(),
                        saved["blank"].tolist(),
                    )
                    pairs = zip(digests, map(FeatureRow, *columns), strict=True)
                    rows |= {digest: row for digest, row in pairs if digest in wanted}
        except OSError:
            continue  # unreadable for now, or another run has just deleted it
        except Exception:  # damaged files may raise any exception
            with contextlib.suppress(OSError):
                path.unlink()
    return rows


def write_rows(store: Path, rows: Mapping[str, FeatureRow]) -> None:
    """Write the rows of a chunk to the cache."""
    if not rows:
        return
    features, thumbnails, captures, since, blank = zip(*rows.values(), strict=True)
    cameras, times = zip(*captures, strict=True)
    arrays = {"features": features, "thumbnails": thumbnails, "cameras": cameras, "times": times, "since": since}
    arrays["blank"] = blank
    write_arrays(store / f"{sha256(list(rows))[:16]}.npz", digests=list(rows), **arrays)


def compute_chunks(missing: Sequence[tuple[str, Path]], workers: Workers) -> Iterator[Results]:
    """Split images into chunks, compute up to `max_tasks` chunks at once, and yield the results in order."""
    tasks: deque[Future[Results]] = deque()
    try:
        for chunk in group(missing, lambda item: file_size(item[1]), MAX_CHUNK_IMAGES, MAX_CHUNK_BYTES):
            items = [(digest, read_content(path) if workers.is_remote else path) for digest, path in chunk]
            tasks.append(workers.executor.submit(compute_chunk, items, time.time_ns()))
            if len(tasks) >= workers.max_tasks:
                yield tasks.popleft().result()
        while tasks:
            yield tasks.popleft().result()
    finally:
        for task in tasks:
            task.cancel()


def read_content(path: Path) -> bytes | Path:
    """Return the content of a file, or its path if it is unreadable: the worker then reports the reason."""
    try:
        return read_file(path)
    except OSError:
        return path


def compute_chunk(items: Sequence[Item], since: int) -> Results:
    """Compute the features of images that were first seen at `since`. With Dask, this runs on a worker."""
    with ThreadPool() as pool:
        images = pool.map(lambda item: decode(*item, IMAGE_SIZE), items)
    pixels = [image[0] for image in images if not isinstance(image, Unusable)]
    features = iter(backbone.compute_features(np.stack(pixels)) if pixels else ())
    return {
        digest: image
        if isinstance(image, Unusable)
        else FeatureRow(next(features), make_thumbnail(image[0]), image[1], since, is_blank(image[0]))
        for (digest, _), image in zip(items, images, strict=True)
    }


def decode(digest: str, source: Path | bytes, size: int) -> tuple[np.ndarray, Capture] | Unusable:
    """Check the digest of an image, and decode it.

    Args:
        digest: the expected SHA-256 of the file
        source: the file, or its content
        size: width and height of the decoded image, in pixels

    Returns:
        The pixels, uint8 of shape (size, size, 3), and the camera and time; or the reason why the image is unusable.
    """
    try:
        content = read_verified(source, digest)
    except OSError as error:
        return Unusable(error.strerror or str(error), is_permanent=False)
    try:
        return read_image(content, size), read_capture(content)
    except ValueError as error:
        return Unusable(str(error))


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Return a grayscale thumbnail like make_thumbnail(), but of an image of any size."""
    return np.asarray(Image.fromarray(pixels).convert("L").resize((THUMBNAIL, THUMBNAIL)))


def read_thumbnail(source: Path | bytes) -> np.ndarray:
    """Return the thumbnail of an image file; raise ValueError if it is unusable."""
    return make_thumbnail(read_image(source, IMAGE_SIZE))


def is_blank(pixels: np.ndarray) -> bool:
    """Return whether an image has only one color; pixels are uint8 of shape (height, width, 3)."""
    return bool((pixels == pixels[0, 0]).all())


def make_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return a grayscale thumbnail, uint8 of shape (THUMBNAIL, THUMBNAIL), of pixels (IMAGE_SIZE, IMAGE_SIZE, 3)."""
    step = IMAGE_SIZE // THUMBNAIL
    return pixels.reshape(THUMBNAIL, step, THUMBNAIL, step, 3).mean(axis=(1, 3, 4)).astype("uint8")
