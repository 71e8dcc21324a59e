"""A folder with one folder of images per class: its files are listed, digested and marked where they are copies.

A file is read again only when its size or its times have changed since `digests-*.json` in the folder `dataset` was
written. Delete that file to have every byte read again.
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

READY_MADE = {"train", "training", "val", "valid", "validation", "test", "testing"}  # folders of a split
CERTAIN_NS = 2 * 10**9  # after so many ns a change of a file's content is sure to give the file another time
COPIES_TOLD = 3  # names in the reason of a copy
MEMORY = TypeAdapter(dict[str, tuple[str, int, int, int]])  # by name: digest, size, and two times


def list_images(folder: Path) -> dict[str, list[Path]]:
    """The files of each class folder, and of the folders in it, by class name; hidden ones are left out.

    Raises WorkflowError when there is no folder, fewer than two classes, a class without a file, or a ready-made split.
    """
    try:
        if not folder.is_dir():
            raise WorkflowError(
                f"{to_text(folder)} is not a folder: --source needs a folder with one folder of images per class"
            )
        classes = [path for path in list_visible(folder) if path.is_dir()]
        images = {to_text(path.name): [file for file in walk(path) if is_image_file(file)] for path in classes}
    except OSError as error:
        raise WorkflowError(f"{to_text(error.filename or folder)} cannot be read: {error.strerror}") from error
    splits = [path for path in classes if path.name.lower() in READY_MADE]
    if (len(splits) > 1 or splits == classes) and any(path.is_dir() for one in splits for path in one.iterdir()):
        names = ", ".join(path.name for path in splits)
        raise WorkflowError(
            f"{to_text(folder)} is split already ({names}): the images are split here by their content. "
            "Put the images of each class together into one folder, or give --source one of these folders"
        )
    if len(classes) < 2:
        raise WorkflowError(
            f"{to_text(folder)} has {len(classes)} class folder(s), but two or more are needed: "
            "one folder of images per class"
        )
    for name in images:
        if not images[name]:
            raise WorkflowError(f"{to_text(folder)}/{name} has no images: fill it or remove it")
    return images


def find_skipped(folder: Path) -> list[DataIssue]:
    """What is visible in a folder and not used: files beside the class folders, and what is no file, such as a pipe."""
    found = []
    for path in list_visible(folder):
        if not path.is_dir():
            found.append(DataIssue(SKIPPED, to_text(path.name), "", "it lies beside the class folders"))
            continue
        for file in walk(path):
            if not is_image_file(file):
                found.append(DataIssue(SKIPPED, to_text(file.relative_to(folder)), to_text(path.name), "it is no file"))
    return found


def walk(folder: Path, unreadable: list[Path] | None = None) -> list[Path]:
    """The visible files in a folder and in all folders in it, sorted; links to folders are not followed.

    A folder that cannot be read is put into `unreadable` if that is given; else OSError is raised.
    """
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        inner = waiting.pop()
        try:
            paths = list_visible(inner)
        except OSError:
            if unreadable is None:
                raise
            unreadable.append(inner)
            continue
        for path in paths:
            (waiting if os.path.isdir(path) and not path.is_symlink() else found).append(path)  # isdir() never raises
    return sorted(found, key=lambda path: path.parts)


def is_image_file(path: Path) -> bool:
    """Whether a path may hold an image: it is a file, or a link that leads nowhere, which is told."""
    return path.is_file() or is_broken_link(path)


def is_broken_link(path: Path) -> bool:
    """Whether the path is a link that leads nowhere."""
    return path.is_symlink() and not path.exists()


def list_visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden files and folders."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def digest_files(folder: Path, cache: Path) -> list[ImageFile]:
    """The image files of a folder, each with its digest; one that cannot be read is set aside.

    A file with the size and the times that digests-*.json in `cache` remembers is not read again.
    """
    memory = cache / f"digests-{sha256(to_text(folder.resolve()))[:8]}.json"
    try:
        known = MEMORY.validate_json(memory.read_bytes())
    except (OSError, ValueError):  # it is not there, or damaged
        known = {}
    seen = {}

    def look_at(path: Path) -> ImageFile:
        name = to_text(path.relative_to(folder).as_posix())
        class_name = name.partition("/")[0]
        try:
            now, status = time.time_ns(), path.stat()
            state = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            digest, *state_then = known.get(name, ("",))
            if tuple(state_then) != state:
                digest = digest_file(path)
            if max(state[1:]) < now - CERTAIN_NS:
                seen[name] = digest, *state
        except OSError as error:
            return ImageFile(name, class_name, "").with_reason(error.strerror or str(error), is_permanent=False)
        return ImageFile(name, class_name, digest)

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(look_at, [path for paths in list_images(folder).values() for path in paths]))
    if seen != known:
        with suppress(WorkflowError):  # the memory only saves time
            write_whole(memory, json.dumps(seen).encode())
    return images


def mark_duplicates(images: list[ImageFile]) -> list[ImageFile]:
    """The image files, with a reason for each exact copy.

    These are all files but the first of the same class, or all of them when two classes have the same image.
    """
    copies: dict[str, list[ImageFile]] = {}
    for image in images:
        copies.setdefault(image.digest, []).append(image)
    reasons: dict[str, str] = {}
    for first, *others in copies.values():
        reasons |= {other.file: f"duplicate of {first.file}" for other in others}
        if len({image.class_name for image in (first, *others)}) > 1:
            more = len(others) + 1 - COPIES_TOLD
            files = ", ".join(image.file for image in (first, *others)[:COPIES_TOLD])
            files += f" and {more} more" if more > 0 else ""
            reasons |= {image.file: f"one image in two classes: {files}" for image in (first, *others)}
    return [image.with_reason(reasons[image.file]) if image.file in reasons else image for image in images]


def check_classes(images: list[ImageFile]) -> None:
    """Raises WorkflowError, which names the class and its images, when a class has too few usable ones."""
    for name in sorted({image.class_name for image in images}):
        of_class = [image for image in images if image.class_name == name]
        usable = sum(not image.reason for image in of_class)
        if usable < MIN_IMAGES_PER_CLASS:
            reasons = [f"{image.file}: {image.reason}" for image in of_class if image.reason]
            told = f"class {name} has {usable} usable image(s), but {MIN_IMAGES_PER_CLASS} are needed"
            raise WorkflowError("; ".join([told, *reasons[:3]]))
