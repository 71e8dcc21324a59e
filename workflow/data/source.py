"""The source of images: a folder, a ZIP file or a URL, and the synthetic samples that replace the default URL."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from workflow.data.archive import archive_folder, check_archive, is_archive, unpack
from workflow.data.folder import list_images
from workflow.errors import WorkflowError
from workflow.files import sha256, write_whole
from workflow.records import ImageFile
from workflow.text import from_text, to_text


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def check_source(source: str) -> None:
    """Raise WorkflowError if the source is not usable, without connecting to the host of a URL."""
    scheme, separator, _ = source.partition("://")
    if not is_url(source):
        if separator and scheme.isalpha() and len(scheme) > 1:
            raise WorkflowError(f"{scheme}:// is not supported; use a folder, or an http:// or https:// URL")
        path = as_folder(source)
        if is_archive(path):
            check_archive(path)
        else:
            list_images(path)
        return
    try:
        url = urlsplit(source)
    except ValueError as error:
        raise WorkflowError(f"{source} is not a valid URL: {error}") from error
    if not url.hostname:
        raise WorkflowError(f"{source} has no host name")
    if url.path.lower().endswith(".zip"):
        raise WorkflowError(f"{source} is a ZIP file; download it, and use --source FILE.zip")
    if "@" in url.netloc:
        raise WorkflowError(
            f"--source: the URL of {url.hostname} contains a user name, which would be stored with the run; put the "
            "user name and password in ~/.netrc instead"
        )


def as_folder(source: str) -> Path:
    """Return the path of a folder or file as typed by a user or converted by to_text(); expand ~ to the home folder."""
    path = os.path.expanduser(source)
    return Path(path) if os.path.exists(path) else from_text(path)


def absolute_source(source: str) -> str:
    """Validate a source; return a URL, or the absolute path of a folder or file as text that JSON can store."""
    check_source(source)
    return source if is_url(source) else to_text(as_folder(source).absolute())


def resolve_source(source: str, default: str, folder: Path) -> tuple[str, Path]:
    """Validate a source, and return it with its image folder: the source itself, or a folder for what it contains.

    Args:
        source: a folder, a ZIP file or a URL
        default: the default source, a URL
        folder: contains the images of the default source; those of other URLs and of ZIP files are beside it
    """
    check_source(source)
    if not is_url(source):
        path = as_folder(source)
        return source, archive_folder(path, folder.parent) if is_archive(path) else path
    source = source.rstrip("/")
    return source, folder if source == default else folder.with_name(f"{folder.name}-{sha256(source)[:8]}")


def unpack_source(source: str, folder: Path) -> str:
    """Unpack a source that is a ZIP file to a folder, and return a line about it for the log."""
    path = as_folder(source)
    if not is_archive(path):
        return f"{folder} is a folder: nothing to download"
    return f"{unpack(path, folder)} files from {to_text(path)} are in {folder}"


def describe_source(source: str, folder: Path, samples: Path) -> str:
    """Describe where images come from: a URL, a ZIP file, their folder itself, or the samples and the reason.

    Args:
        source: a folder, a ZIP file or a URL
        folder: contains the images
        samples: contains the synthetic images
    """
    if not is_url(source):
        path = as_folder(source)
        return to_text((path if os.path.isfile(path) else folder).resolve())
    if any((folder / sample.relative_to(samples)).exists() for sample in list_samples(samples)):
        return f"sample_images, because {urlsplit(source).hostname} did not provide the lab's photos"
    return source


def list_samples(samples: Path) -> list[Path]:
    return sorted(samples.glob("*/*.jpeg"))


def copy_samples(samples: Path, folder: Path) -> None:
    """Copy the synthetic images into a folder."""
    for sample in list_samples(samples):
        write_whole(folder / sample.relative_to(samples), sample.read_bytes())


def remove_samples(samples: Path, folder: Path) -> None:
    """Remove the synthetic images from a folder, identified by content because earlier releases used other names."""
    digests = read_digests(samples)
    for path in list_samples(folder):
        if sha256(path.read_bytes()) in digests:
            path.unlink(missing_ok=True)


def read_digests(samples: Path) -> set[str]:
    return {sha256(sample.read_bytes()) for sample in list_samples(samples)}


def are_synthetic(images: list[ImageFile], samples: Path) -> bool:
    """Return whether all images are copies of the synthetic images in `samples`."""
    digests = read_digests(samples)
    return all(image.digest in digests for image in images)
