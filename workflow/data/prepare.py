"""Prepare the images of a folder as inputs of a model: features of the backbone, or resized copies.

Resized copies are cached, one file per image: the SHA-256 of the pixels, then the pixels.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from workflow.data.data_issues import Folder, find_issues
from workflow.data.features import Unusable, Workers, decode, load_features
from workflow.data.folder import find_skipped
from workflow.data.near_duplicates import group_near_duplicates
from workflow.data.sessions import assign_sessions
from workflow.files import sha256, write_whole
from workflow.image_classifier import READING_VERSION
from workflow.records import DataIssue, ImageFile

import numpy as np
import PIL

DIGEST_BYTES = 32  # at the start of each resized copy


class Prepared(NamedTuple):
    """The images of a folder, prepared for training.

    Attributes:
        images: all images, with a reason for each unusable one
        inputs: features or resized pixels of each usable image, by digest
        duplicate_of: maps the digest of each near-duplicate to that of its representative
        issues: the data issues of the folder
        sessions: session of each image whose camera and time are known, by digest
    """

    images: list[ImageFile]
    inputs: dict[str, np.ndarray]
    duplicate_of: dict[str, str]
    issues: list[DataIssue]
    sessions: dict[str, str]


def prepare_features(
    images: list[ImageFile],
    folder: Path,
    cache: Path,
    workers: AbstractContextManager[Workers],
    progress: Callable[[int, int], None],
) -> Prepared:
    """Prepare images as features, with near-duplicates, sessions and all data issues; see load_features()."""
    images, rows = load_features(images, folder, cache, workers, progress)
    features = {digest: row.features for digest, row in rows.items()}
    captures = {digest: row.capture for digest, row in rows.items()}
    duplicate_of, sessions = group_near_duplicates(rows), assign_sessions(captures)
    usable = [image for image in images if not image.reason]
    issues = find_issues(Folder(folder, usable, features, duplicate_of, captures, sessions))
    return Prepared(images, features, duplicate_of, [*issues, *find_skipped(folder)], sessions)


def prepare_pixels(images: list[ImageFile], folder: Path, cache: Path, size: int) -> Prepared:
    """Prepare images as resized copies, without near-duplicates and sessions. Only skipped files are data issues.

    Args:
        images: the images of the folder; those with a reason are ignored
        folder: contains the image files
        cache: the parent folder of the cache
        size: width and height of the copies, in pixels; they are uint8 of shape (size, size, 3)
    """
    store = cache / f"resized-{size}-{sha256([PIL.__version__, READING_VERSION])[:12]}"

    def resize(image: ImageFile) -> tuple[ImageFile, np.ndarray | None]:
        if image.reason:
            return image, None
        copy = store / f"{image.digest}.pixels"
        pixels = read_copy(copy, size)
        if pixels is None:
            decoded = decode(image.digest, image.path_in(folder), size)
            if isinstance(decoded, Unusable):
                return image.with_reason(*decoded), None
            pixels = decoded[0]
            write_whole(copy, hashlib.sha256(pixels.tobytes()).digest() + pixels.tobytes(), durable=False)
        return image, pixels

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(resize, images))
    inputs = {image.digest: pixels for image, pixels in results if pixels is not None}
    return Prepared([image for image, _ in results], inputs, {}, find_skipped(folder), {})


def read_copy(copy: Path, size: int) -> np.ndarray | None:
    """Return the pixels of a resized copy, or None if it is missing or damaged."""
    try:
        content = copy.read_bytes()
    except OSError:
        return None
    digest, pixels = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if len(pixels) != size * size * 3 or hashlib.sha256(pixels).digest() != digest:
        return None
    return np.frombuffer(pixels, "uint8").reshape(size, size, 3)
