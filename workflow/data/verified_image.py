"""Images whose content is known by its digest: what a run uses is what it has digested."""

from pathlib import Path

from workflow.data.exif import Capture, read_capture
from workflow.files import read_file, sha256
from workflow.image_classifier import read_image

import numpy as np


def read_verified(digest: str, content: Path | bytes, size: int) -> tuple[np.ndarray | str, bool]:
    """The pixels of an image, or the reason why there are none; and True when another attempt gives the same result.

    `content` is the image's file, or what is in it; `digest` is its SHA-256. The pixels are uint8 of shape
    (size, size, 3).
    """
    pixels, is_permanent, _ = read_with_capture(digest, content, size)
    return pixels, is_permanent


def read_with_capture(digest: str, content: Path | bytes, size: int) -> tuple[np.ndarray | str, bool, Capture]:
    """Return what read_verified() returns, and the camera and time from the same bytes."""
    try:
        content = content if isinstance(content, bytes) else read_file(content)
    except OSError as error:
        return error.strerror or str(error), False, Capture()
    if sha256(content) != digest:
        return "its content has changed since this run began", False, Capture()
    try:
        return read_image(content, size), True, read_capture(content)
    except ValueError as error:
        return str(error), True, Capture()


def can_see(digest: str, path: Path) -> bool:
    """Whether this machine has a file with that digest at that path."""
    try:
        return sha256(read_file(path)) == digest
    except OSError:
        return False
