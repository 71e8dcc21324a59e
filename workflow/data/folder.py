"""List the images of a folder with one folder per class, compute their digests, and mark exact copies.

A file is read again only if its size or timestamps differ from those in `digests-*.json` in the folder `dataset`.
Delete that cache to force a complete check.
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from workflow.data.split import MIN_IMAGES_PER_CLASS
from workflow.errors import WorkflowError
from workflow.files import digest_file, sha256, write_whole
from workflow.records import SKIPPED, DataIssue, ImageFile
from workflow.text import to_text

from pydantic import TypeAdapter

SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
MIN_AGE_NS = 2 * 10**9  # timestamps are coarse, so a file that is younger may change without changing them
MAX_COPIES_NAMED = 3  # listed in the reason for skipping a copy
DIGESTS = TypeAdapter(dict[str, tuple[str, int, int, int]])  # by file: digest, size, and two timestamps


def list_images(folder: Path) -> dict[str, list[Path]]:
    """Return the files in each class folder and its subfolders, by class name; hidden files are ignored.

    Raises:
        WorkflowError: the folder is missing, has fewer than two classes or an empty class, or is already split
    """
    try:
        if not folder.is_dir():
            raise WorkflowError(
                f"{folder} is not a folder; --source needs a folder with one folder of images per class"
            )
        classes = [path for path in list_visible(folder) if path.is_dir()]
        images = {to_text(path.name): [file for file in walk(path) if is_image_file(file)] for path in classes}
    except OSError as error:
        raise WorkflowError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    splits = [path for path in classes if path.name.lower() in SPLIT_FOLDERS]
    if (len(splits) > 1 or splits == classes) and any(path.is_dir() for split in splits for path in split.iterdir()):
        names = ", ".join(path.name for path in splits)
        raise WorkflowError(
            f"{folder} is already split ({names}), but this program splits the images itself; merge the "
            "images of each class into one folder, or use one of these folders as --source"
        )
    if len(classes) < 2:
        raise WorkflowError(f"{folder} has {len(classes)} class folder(s); create at least two, one per class")
    for name in images:
        if not images[name]:
            raise WorkflowError(f"{folder / name} has no images; add images or remove the folder")
    return images


def find_skipped(folder: Path) -> list[DataIssue]:
    """Return an issue for each visible file outside the class folders, and each pipe or device inside them."""
    issues = []
    for path in list_visible(folder):
        if not path.is_dir():
            issues.append(DataIssue(SKIPPED, to_text(path.name), "", "not in a class folder"))
            continue
        for file in walk(path):
            if not is_image_file(file):
                name = to_text(file.relative_to(folder).as_posix())
                issues.append(DataIssue(SKIPPED, name, to_text(path.name), "not a regular file"))
    return issues


def walk(folder: Path, unreadable: list[Path] | None = None) -> list[Path]:
    """Return the visible files in a folder and its subfolders, sorted; links to folders are not followed.

    Append unreadable folders to `unreadable`; without that list, raise OSError.
    """
    files: list[Path] = []
    folders = [folder]
    while folders:
        current = folders.pop()
        try:
            paths = list_visible(current)
        except OSError:
            if unreadable is None:
                raise
            unreadable.append(current)
            continue
        for path in paths:
            (folders if os.path.isdir(path) and not path.is_symlink() else files).append(path)  # isdir() never raises
    return sorted(files, key=lambda path: path.parts)


def is_image_file(path: Path) -> bool:
    """Return whether a path may be an image: a file, or a broken link, which is reported as unreadable later."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def list_visible(folder: Path) -> list[Path]:
    """Return the files and folders in a folder, sorted by name, without hidden ones."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def digest_files(folder: Path, cache: Path) -> list[ImageFile]:
    """Return the images of a folder with their digests, and with a `reason` for each unreadable one.

    Files whose size and timestamps match those in digests-*.json in `cache` are not read again.
    """
    store = cache / f"digests-{sha256(os.fsencode(folder.resolve()))[:8]}.json"
    try:
        cached = DIGESTS.validate_json(store.read_bytes())
    except (OSError, ValueError):  # missing or damaged
        cached = {}
    current = {}

    def digest(path: Path) -> ImageFile:
        file = to_text(path.relative_to(folder).as_posix())
        class_name = file.partition("/")[0]
        try:
            now, status = time.time_ns(), path.stat()
            state = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            content_digest, *cached_state = cached.get(file, ("",))
            if tuple(cached_state) != state:
                content_digest = digest_file(path)
            if max(state[1:]) < now - MIN_AGE_NS:
                current[file] = content_digest, *state
        except OSError as error:
            return ImageFile(file, class_name, "").with_reason(error.strerror or str(error), is_permanent=False)
        return ImageFile(file, class_name, content_digest)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(digest, [path for paths in list_images(folder).values() for path in paths]))
    if current != cached:
        with suppress(WorkflowError):  # without the cache, the next run only takes longer
            write_whole(store, json.dumps(current).encode())
    return images


def mark_duplicates(images: list[ImageFile]) -> list[ImageFile]:
    """Return the images, with a `reason` to skip each exact copy.

    Within a class, the first file is used. An image that is in two classes is skipped altogether.
    """
    files_of: dict[str, list[ImageFile]] = {}
    for image in images:
        files_of.setdefault(image.digest, []).append(image)
    reasons: dict[str, str] = {}
    for copies in files_of.values():
        reasons |= {copy.file: f"duplicate of {copies[0].file}" for copy in copies[1:]}
        if len({image.class_name for image in copies}) > 1:
            names = ", ".join(image.file for image in copies[:MAX_COPIES_NAMED])
            rest = f" and {len(copies) - MAX_COPIES_NAMED} more" if len(copies) > MAX_COPIES_NAMED else ""
            reasons |= {image.file: f"same image in two classes: {names}{rest}" for image in copies}
    return [image.with_reason(reasons[image.file]) if image.file in reasons else image for image in images]


def check_classes(images: list[ImageFile]) -> None:
    """Raise WorkflowError if a class has too few usable images; the message says why others are unusable."""
    for name in sorted({image.class_name for image in images}):
        of_class = [image for image in images if image.class_name == name]
        usable = sum(not image.reason for image in of_class)
        if usable < MIN_IMAGES_PER_CLASS:
            reasons = [f"{image.file}: {image.reason}" for image in of_class if image.reason]
            message = f"class {name} has {usable} usable image(s), but {MIN_IMAGES_PER_CLASS} are needed"
            raise WorkflowError("; ".join([message, *reasons[:3]]))
