"""The images of a folder, made ready to learn from: as features of the backbone, or as shrunk copies."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from workflow.data.data_issues import check_folder
from workflow.data.features import load_features
from workflow.data.folder import find_skipped
from workflow.data.near_duplicates import group_images
from workflow.data.sessions import assign_sessions
from workflow.data.shrunk import load_shrunk
from workflow.records import DataIssue, ImageFile

import numpy as np


class Prepared(NamedTuple):
    """What there is to learn from.

    `inputs` has the features of each usable image by its digest, or the path of its shrunk copy. `duplicate_of` has the
    digest of the image that each near-duplicate follows. `sessions` has the session of each image whose EXIF data have
    its camera and time.
    """

    images: list[ImageFile]
    inputs: Mapping[str, np.ndarray | Path]
    duplicate_of: dict[str, str]
    issues: list[DataIssue]
    sessions: dict[str, str]


def prepare_features(
    images: list[ImageFile], folder: Path, cache: Path, dask: str | None, progress: Callable[[int, int], None]
) -> Prepared:
    """Return the images as features, with near-duplicates, issues and sessions; see load_features()."""
    images, known = load_features(images, folder, cache, dask, progress)
    features = {digest: known.features[row] for digest, row in known.rows.items()}
    duplicate_of, pairs = group_images(images, known.rows, known.features, known.thumbnails, known.since)
    sessions = assign_sessions(known.captures)
    issues = check_folder(images, features, pairs, folder, known.captures, sessions)
    return Prepared(images, features, duplicate_of, [*issues, *find_skipped(folder)], sessions)


def prepare_pixels(images: list[ImageFile], folder: Path, cache: Path, size: int) -> Prepared:
    """Return the images as copies of `size` pixels on both sides, without near-duplicates and sessions."""
    images, copies = load_shrunk(images, folder, cache, size)
    return Prepared(images, copies, {}, find_skipped(folder), {})
