"""Images whose content is known by its digest: what a run uses is what it has digested."""

from pathlib import Path

from workflow.files import read_file, sha256
from workflow.model.image_classifier import read_image

import numpy as np


def read_verified(digest: str, content: Path | bytes, size: int) -> tuple[np.ndarray | str, bool]:
    """The pixels of an image, or the reason why there are none; and True when another attempt gives the same result.

    `content` is the image's file, or what is in it; `digest` is its SHA-256. The pixels are uint8 of shape
    (size, size, 3).
    """
    try:
        content = content if isinstance(content, bytes) else read_file(content)
    except OSError as error:
        return error.strerror or str(error), False
    if sha256(content) != digest:
        return "its content has changed since this run began", False
    try:
        return read_image(content, size), True
    except ValueError as error:
        return str(error), True


def can_see(digest: str, path: Path) -> bool:
    """Whether this machine has a file with that digest at that path."""
    try:
        return sha256(read_file(path)) == digest
    except OSError:
        return False
