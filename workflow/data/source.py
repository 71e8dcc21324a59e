"""What a user gives as the source of images: a folder, or a URL."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from workflow.data.folder import list_images
from workflow.errors import WorkflowError
from workflow.files import sha256
from workflow.records import ImageFile
from workflow.text import from_text


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def check_source(source: str) -> None:
    """Raises WorkflowError when nothing can be had from the source, before anything starts."""
    kind, is_there, _ = source.partition("://")
    if not is_url(source):
        if is_there and kind.isalpha() and len(kind) > 1:
            raise WorkflowError(f"{kind}:// is no source: give a folder, or a URL that begins with http:// or https://")
        list_images(as_folder(source))
        return
    try:
        url = urlsplit(source)
    except ValueError as error:
        raise WorkflowError(f"{source} is no URL: {error}") from error
    if not url.hostname:
        raise WorkflowError(f"{source} names no host")
    if "@" in url.netloc:
        raise WorkflowError(
            f"--source: the URL of {url.hostname} has a user name in it, which would be stored with the run: put it "
            "and the password into the file .netrc instead"
        )


def as_folder(source: str) -> Path:
    """The path of a source that is a folder, as to_text() gives it or a person has typed it.

    ~ is the user's own, and the ~ of a user who is not there stays.
    """
    path = os.path.expanduser(source)
    return Path(path) if os.path.exists(path) else from_text(path)


def are_synthetic(images: list[ImageFile], samples: Path) -> bool:
    """Whether all images are files of the folder `samples`: drawn images, which stand in for photos."""
    digests = {sha256(sample.read_bytes()) for sample in samples.glob("*/*.jpeg")}
    return all(image.digest in digests for image in images)
