"""Prepare the images of a folder as inputs to a model: features of the backbone, or resized pixels."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from workflow.data.data_issues import Folder, find_blank, find_issues, find_near_duplicates
from workflow.data.features import Unusable, Workers, decode, is_blank, load_features, shrink
from workflow.data.folder import find_skipped
from workflow.data.near_duplicates import group_copies, group_near_duplicates
from workflow.data.sessions import assign_sessions
from workflow.data.source import are_synthetic, describe_source
from workflow.records import DataIssue, DataVersion, ImageFile
from workflow.text import to_text

import numpy as np


class Prepared(NamedTuple):
    """The images of a folder, prepared for training."""

    images: list[ImageFile]  # all images, with a `reason` for each unusable one
    inputs: dict[str, np.ndarray]  # features or resized pixels of each usable image, by digest
    duplicate_of: dict[str, str]  # digest of each near-duplicate -> digest of its representative
    issues: list[DataIssue]  # the data issues of the folder
    sessions: dict[str, str]  # session by digest, of the images whose camera and time are known

    def to_data_version(
        self, images: list[ImageFile], source: str, folder: Path, samples: Path, name: str
    ) -> DataVersion:
        """Return the data version of these images.

        Args:
            images: all images, with the split of each usable one
            source: where they come from: a folder, a ZIP file or a URL
            folder: contains the images
            samples: contains the synthetic images
            name: name of the registered model; "" names it after the classes
        """
        return DataVersion(
            source=describe_source(source, folder, samples),
            folder=to_text(folder.resolve()),
            files=images,
            duplicate_of=self.duplicate_of,
            issues=self.issues,
            synthetic=are_synthetic(images, samples),
            sessions=self.sessions,
            model_name=name,
        )


def prepare_features(
    images: list[ImageFile],
    folder: Path,
    cache: Path,
    workers: AbstractContextManager[Workers],
    progress: Callable[[int, int], None],
) -> Prepared:
    """Compute the features of images, and find near-duplicates, sessions and all data issues; see load_features()."""
    images, rows = load_features(images, folder, cache, workers, progress)
    features = {digest: row.features for digest, row in rows.items()}
    captures = {digest: row.capture for digest, row in rows.items()}
    duplicate_of, sessions = group_near_duplicates(rows), assign_sessions(captures)
    usable = [image for image in images if not image.reason]
    blank = {digest for digest, row in rows.items() if row.is_blank}
    issues = find_issues(Folder(folder, usable, features, duplicate_of, captures, sessions, blank))
    return Prepared(images, features, duplicate_of, [*issues, *find_skipped(folder)], sessions)


def prepare_pixels(images: list[ImageFile], folder: Path, size: int) -> Prepared:
    """Read images as pixels, uint8 of shape (size, size, 3), without finding sessions.

    The only near-duplicates are copies of an image, and the only data issues are these copies, blank images and
    skipped files.
    """

    def resize(image: ImageFile) -> tuple[ImageFile, np.ndarray | None]:
        if image.reason:
            return image, None
        decoded = decode(image.digest, image.path_in(folder), size)
        return (image.with_reason(*decoded), None) if isinstance(decoded, Unusable) else (image, decoded[0])

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(resize, images))
    inputs = {image.digest: pixels for image, pixels in results if pixels is not None}
    copy_of = group_copies({digest: shrink(pixels) for digest, pixels in inputs.items()})
    blank = {digest for digest, pixels in inputs.items() if is_blank(pixels)}
    usable = [image for image, pixels in results if pixels is not None]
    prepared = Folder(folder, usable, {}, copy_of, {}, {}, blank)
    issues = [*find_blank(prepared), *find_near_duplicates(prepared), *find_skipped(folder)]
    return Prepared([image for image, _ in results], inputs, copy_of, issues, {})
