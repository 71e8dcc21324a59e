"""The features of the images in a folder, computed once and cached.

The cache is a folder of files with up to MAX_CHUNK_IMAGES images each. Its name depends on the versions of everything
that computes features. Damaged files are deleted, and their images computed again.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool  # its threads end with the call
from pathlib import Path
from typing import NamedTuple, Protocol

from workflow.data import exif
from workflow.data.exif import Capture, read_capture
from workflow.files import file_size, group, read_file, read_verified, sha256, write_arrays
from workflow.image_classifier import READING_VERSION, read_image
from workflow.model import backbone, backbone_weights
from workflow.model.backbone import FEATURES, IMAGE_SIZE
from workflow.records import ImageFile

import numpy as np
import PIL

VERSION = 1  # increase when thumbnails or the arrays in the cache change
THUMBNAIL = 48  # pixels, both sides, of the gray image that near_duplicates.py compares; it divides IMAGE_SIZE
MAX_CHUNK_IMAGES = 64  # computed by one task, and lost when its process dies
MAX_CHUNK_BYTES = 8_000_000  # of image files in one task, because they may be sent to a worker
Item = tuple[str, Path | bytes]  # the digest of an image, and its file or content


class Unusable(NamedTuple):
    """Why an image cannot be used; a reason that is not permanent may pass."""

    reason: str
    is_permanent: bool = True


class FeatureRow(NamedTuple):
    """What is computed from a usable image.

    Attributes:
        features: float32 of shape (FEATURES,)
        thumbnail: uint8 of shape (THUMBNAIL, THUMBNAIL)
        capture: camera and time
    """

    features: np.ndarray
    thumbnail: np.ndarray
    capture: Capture


Results = list[tuple[str, FeatureRow | Unusable]]  # of a chunk, each with the digest of its image


class Workers(Protocol):
    """Compute chunks: orchestration/cluster.py has an implementation."""

    @property
    def executor(self) -> Executor: ...
    @property
    def max_tasks(self) -> int:
        """How many tasks to submit at once."""

    @property
    def is_remote(self) -> bool:
        """Whether the workers may lack access to the image files, so that their content is sent."""


@dataclass
class FeatureTable:
    """The features of many images: a row of each array for each usable image.

    Attributes:
        rows: the row of each usable image by its digest
        features: float32 of shape (images, FEATURES)
        thumbnails: uint8 of shape (images, THUMBNAIL, THUMBNAIL)
        since: when each image was first seen, int64 of shape (images,), ns since 1970
        captures: camera and time of each usable image by its digest
        unusable: the reason for each other image by its digest
    """

    rows: dict[str, int]
    features: np.ndarray
    thumbnails: np.ndarray
    since: np.ndarray
    captures: dict[str, Capture] = field(default_factory=dict)
    unusable: dict[str, Unusable] = field(default_factory=dict)

    @classmethod
    def reserve(cls, count: int) -> "FeatureTable":
        """Return an empty table with room for `count` images."""
        features, thumbnails = np.empty((count, FEATURES), "float32"), np.empty((count, THUMBNAIL, THUMBNAIL), "uint8")
        return cls({}, features, thumbnails, np.empty(count, "int64"))

    def add(self, digest: str, result: FeatureRow | Unusable, since: int) -> None:
        if isinstance(result, Unusable):
            self.unusable[digest] = result
        elif digest not in self.rows:
            row = self.rows[digest] = len(self.rows)
            self.features[row], self.thumbnails[row], self.captures[digest] = result
            self.since[row] = since

    def by_digest(self) -> dict[str, np.ndarray]:
        """Return the features of each usable image by its digest."""
        return {digest: self.features[row] for digest, row in self.rows.items()}


def load_features(
    images: list[ImageFile],
    folder: Path,
    cache: Path,
    workers: contextlib.AbstractContextManager[Workers],
    progress: Callable[[int, int], None],
) -> tuple[list[ImageFile], FeatureTable]:
    """Load the features of images from the cache, and compute those that are missing.

    Args:
        images: the images of the folder; those with a reason are ignored
        folder: contains the image files
        cache: the parent folder of the cache
        workers: compute the features; entered only if features are missing
        progress: called with the numbers of finished and of all images after each chunk but the last

    Returns:
        The images, with the reason if they are unusable, and the features of the usable ones.
    """
    store = store_folder(cache)
    paths = {image.digest: image.path_in(folder) for image in images if not image.reason}
    table = FeatureTable.reserve(len(paths))
    read_store(store, paths, table)
    if missing := [item for item in paths.items() if item[0] not in table.rows and item[0] not in table.unusable]:
        done = 0
        with workers as pool:
            for results in compute_chunks(missing, pool):
                since = time.time_ns()
                write_chunk(store, results, since)
                for digest, result in results:
                    table.add(digest, result, since)
                done += len(results)
                if done < len(missing):
                    progress(done, len(missing))
    skipped = table.unusable
    return [image.with_reason(*skipped[image.digest]) if image.digest in skipped else image for image in images], table


def store_folder(cache: Path) -> Path:
    """Return the folder of the cache for the current versions."""
    versions = READING_VERSION, exif.VERSION, backbone.FEATURES_VERSION, VERSION
    return cache / f"features-{backbone.NAME}-{sha256([backbone_weights.DIGEST, PIL.__version__, *versions])[:12]}"


def read_store(store: Path, wanted: Container[str], table: FeatureTable) -> None:
    """Add all results in the cache for the wanted digests to the table."""
    for path in sorted(store.glob("*.npz")):
        try:
            with open(path, "rb") as file, np.load(file) as saved:
                digests = saved["digests"].tolist()
                rows = [row for row, digest in enumerate(digests) if digest in wanted]
                if rows:
                    reasons, features, thumbnails = saved["reasons"], saved["features"], saved["thumbnails"]
                    cameras, times, since = saved["cameras"], saved["times"], int(saved["since"])
                    check_arrays(len(digests), reasons, features, thumbnails, cameras, times)
                    reasons, captures = reasons.tolist(), list(map(Capture, cameras.tolist(), times.tolist()))
                    for row in rows:
                        result = FeatureRow(features[row], thumbnails[row], captures[row])
                        table.add(digests[row], Unusable(reasons[row]) if reasons[row] else result, since)
        except OSError:
            continue  # unreadable for now, or another run has just deleted it
        except Exception:  # damaged files raise almost anything
            with contextlib.suppress(OSError):
                path.unlink()


def check_arrays(count: int, *arrays: np.ndarray) -> None:
    """Raise ValueError unless the arrays of a file, from `reasons` to `times`, are as write_chunk() writes them."""
    shapes = (count,), (count, FEATURES), (count, THUMBNAIL, THUMBNAIL), (count,), (count,)
    for array, kind, shape in zip(arrays, "UfuUi", shapes, strict=True):
        if (array.dtype.kind, array.shape) != (kind, shape):
            raise ValueError(f"an array has the type {array.dtype} and the shape {array.shape}")


def write_chunk(store: Path, results: Results, since: int) -> None:
    """Write the permanent results of a chunk to the cache; `since` is when its images were first seen."""
    permanent = [item for item in results if isinstance(item[1], FeatureRow) or item[1].is_permanent]
    if not permanent:
        return
    empty = FeatureRow(np.zeros(FEATURES, "float32"), np.zeros((THUMBNAIL, THUMBNAIL), "uint8"), Capture())
    rows = [empty if isinstance(result, Unusable) else result for _, result in permanent]
    cameras, times = zip(*(row.capture for row in rows), strict=True)
    digests = [digest for digest, _ in permanent]
    write_arrays(
        store / f"{sha256(digests)[:16]}.npz",
        digests=np.array(digests),
        reasons=np.array([result.reason if isinstance(result, Unusable) else "" for _, result in permanent]),
        features=np.stack([row.features for row in rows]),
        thumbnails=np.stack([row.thumbnail for row in rows]),
        cameras=np.array(cameras),
        times=np.array(times, "int64"),
        since=since,
    )


def compute_chunks(missing: Sequence[tuple[str, Path]], workers: Workers) -> Iterator[Results]:
    """Compute chunks of images with at most `max_tasks` tasks at once, and yield their results in order."""
    tasks: deque[Future[Results]] = deque()
    try:
        for chunk in group(missing, lambda item: file_size(item[1]), MAX_CHUNK_IMAGES, MAX_CHUNK_BYTES):
            items = [(digest, read_content(path) if workers.is_remote else path) for digest, path in chunk]
            tasks.append(workers.executor.submit(compute_chunk, items))
            if len(tasks) >= workers.max_tasks:
                yield tasks.popleft().result()
        while tasks:
            yield tasks.popleft().result()
    finally:
        for task in tasks:
            task.cancel()


def read_content(path: Path) -> bytes | Path:
    """Return the content of a file, or the path of an unreadable file, so that the worker reports why."""
    try:
        return read_file(path)
    except OSError:
        return path


def compute_chunk(items: Sequence[Item]) -> Results:
    """Compute the features of images; on a Dask cluster, this runs on the workers."""
    with ThreadPool() as pool:
        images = pool.map(lambda item: decode(*item, IMAGE_SIZE), items)
    pixels = [image[0] for image in images if not isinstance(image, Unusable)]
    features = iter(backbone.compute_features(np.stack(pixels)) if pixels else ())
    return [
        (
            digest,
            image if isinstance(image, Unusable) else FeatureRow(next(features), make_thumbnail(image[0]), image[1]),
        )
        for (digest, _), image in zip(items, images, strict=True)
    ]


def decode(digest: str, source: Path | bytes, size: int) -> tuple[np.ndarray, Capture] | Unusable:
    """Decode an image if its SHA-256 is `digest`.

    Args:
        digest: the expected SHA-256 of the file
        source: the file, or its content
        size: of the decoded image, in pixels

    Returns:
        The pixels, uint8 of shape (size, size, 3), with camera and time; or why the image is unusable.
    """
    try:
        content = read_verified(source, digest)
    except OSError as error:
        return Unusable(error.strerror or str(error), is_permanent=False)
    try:
        return read_image(content, size), read_capture(content)
    except ValueError as error:
        return Unusable(str(error))


def make_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return a gray image, uint8 of shape (THUMBNAIL, THUMBNAIL), of pixels (IMAGE_SIZE, IMAGE_SIZE, 3)."""
    step = IMAGE_SIZE // THUMBNAIL
    return pixels.reshape(THUMBNAIL, step, THUMBNAIL, step, 3).mean(axis=(1, 3, 4)).astype("uint8")
