"""Prepare the images of a folder as inputs of a model: features of the backbone, or resized copies.

Resized copies are cached, one file per image: the SHA-256 of the pixels, then the pixels. Each is verified before use,
and written again if it is damaged.
"""

import hashlib
from collections.abc import Callable, Mapping
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
        inputs: features of each usable image, or the path of its resized copy, by its digest
        duplicate_of: the digest of the representative of each near-duplicate, by its digest
        issues: the data issues of the folder
        sessions: of the images whose camera and time are known, by digest
    """

    images: list[ImageFile]
    inputs: Mapping[str, np.ndarray | Path]
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
    """Return images as features, with near-duplicates, sessions and all data issues; see load_features()."""
    images, table = load_features(images, folder, cache, workers, progress)
    usable, features = [image for image in images if not image.reason], table.by_digest()
    duplicate_of, sessions = group_near_duplicates(table), assign_sessions(table.captures)
    issues = find_issues(Folder(folder, usable, features, duplicate_of, table.captures, sessions))
    return Prepared(images, features, duplicate_of, [*issues, *find_skipped(folder)], sessions)


def prepare_pixels(images: list[ImageFile], folder: Path, cache: Path, size: int) -> Prepared:
    """Return images as resized copies, without near-duplicates, sessions and other data issues than skipped files.

    Args:
        images: the images of the folder; those with a reason are ignored
        folder: contains the image files
        cache: the parent folder of the cache
        size: of the copies, in pixels, both sides
    """
    store = cache / f"resized-{size}-{sha256([PIL.__version__, READING_VERSION])[:12]}"
    copies = {image.digest: store / f"{image.digest}.pixels" for image in images}

    def resize(image: ImageFile) -> ImageFile:
        if image.reason or is_whole(copies[image.digest], size):
            return image
        decoded = decode(image.digest, image.path_in(folder), size)
        if isinstance(decoded, Unusable):
            return image.with_reason(*decoded)
        content = decoded[0].tobytes()
        write_whole(copies[image.digest], hashlib.sha256(content).digest() + content, durable=False)
        return image

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(resize, images))
    inputs = {image.digest: copies[image.digest] for image in images if not image.reason}
    return Prepared(images, inputs, {}, find_skipped(folder), {})


def is_whole(copy: Path, size: int) -> bool:
    """Return whether a resized copy exists and is undamaged."""
    try:
        content = copy.read_bytes()
    except OSError:
        return False
    digest, pixels = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return len(pixels) == size * size * 3 and hashlib.sha256(pixels).digest() == digest


def read_pixels(copy: Path) -> np.ndarray:
    """Return the pixels of a resized copy, uint8 of shape (size, size, 3)."""
    pixels = np.frombuffer(copy.read_bytes(), "uint8", offset=DIGEST_BYTES)
    size = round((len(pixels) / 3) ** 0.5)
    return pixels.reshape(size, size, 3)
