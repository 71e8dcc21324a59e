"""List the images of a folder with one folder per class, compute their digests, and mark exact copies.

A file is read again only if its size or timestamps differ from those in `digests-*.json` in the `dataset` folder.
Delete that cache to force a complete check.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from workflow.data.layout import explain_layout
from workflow.data.other_files import explain_clutter, explain_stand_in, is_hidden
from workflow.data.split import MIN_IMAGES_PER_CLASS
from workflow.errors import WorkflowError
from workflow.files import digest_file, sha256, write_whole
from workflow.records import SKIPPED, DataIssue, ImageFile
from workflow.text import to_class_name, to_text

from pydantic import TypeAdapter

MIN_AGE_NS = 2 * 10**9  # timestamps are coarse, so a file that is younger may change without changing them
MAX_COPIES_NAMED = 3  # listed in the reason for skipping a copy
DIGESTS = TypeAdapter(dict[str, tuple[str, int, int, int]])  # by file: digest, size, and two timestamps


def list_images(folder: Path) -> dict[str, list[Path]]:
    """Return the files in each class folder and its subfolders, by class name; hidden files are ignored.

    Raises:
        WorkflowError: the folder is missing, has fewer than two classes or a class without photos, or is laid out
            differently, for example already split
    """
    try:
        if not folder.is_dir():
            raise WorkflowError(
                f"{folder} is not a folder; --source needs a folder with one folder of images per class, or a ZIP of it"
            )
        classes = list_class_folders(folder)
        images: dict[str, list[Path]] = {}
        for path in classes:
            images.setdefault(to_class_name(path.name), []).extend(filter(is_image_file, walk(path)))
        if reason := explain_layout(folder):
            raise WorkflowError(reason)
        if len(classes) < 2:
            raise WorkflowError(
                f"{folder} has {len(classes)} class folder(s); create at least two, one per class{find_hint(folder)}"
            )
        for path in classes:
            check_has_photos(path, images[to_class_name(path.name)])
    except OSError as error:
        raise WorkflowError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    return images


def find_hint(folder: Path) -> str:
    """Return a hint about where the classes are if a folder has fewer than two class folders; "" if there is none."""
    for path in list_class_folders(folder):
        if len(list_class_folders(path)) > 1:
            return f"; if the folders in {path} are the classes, use that as --source"
    if reasons := [f"{path.name} is {reason}" for path in list_visible(folder) if (reason := explain_unused(path))]:
        return f"; {reasons[0]}"
    return ""


def check_has_photos(folder: Path, files: list[Path]) -> None:
    """Raise WorkflowError if a class folder has no files, or none that may be a photo."""
    if not files:
        raise WorkflowError(f"{folder} has no images; add images or remove the folder")
    reasons = []
    for file in files:
        if not (reason := explain_unused(file)):
            return
        reasons.append(f"{file.name} is {reason}")
    more = f" (and {len(files) - 1} more unusable file{'s' * (len(files) > 2)})" if len(files) > 1 else ""
    raise WorkflowError(f"{folder} has no images: {reasons[0]}{more}")


def explain_unused(path: Path) -> str:
    """Return why a file is not a photo, as explain_stand_in() does; "" for an unreadable file."""
    try:
        return explain_stand_in(path)
    except OSError:  # reported when it is read
        return ""


def find_skipped(folder: Path) -> list[DataIssue]:
    """Return an issue for each file outside the class folders, and for everything in them that cannot be a photo.

    Hidden files are ignored; system folders are reported even if they are hidden.
    """
    skipped: dict[Path, str] = {}
    for path in list_class_folders(folder, skipped):
        for file in walk(path, skipped=skipped):
            if not is_image_file(file):
                skipped[file] = "a link to a folder" if os.path.isdir(file) else "not a regular file"
    files = {path.relative_to(folder): reason for path, reason in skipped.items()}
    return [
        DataIssue(SKIPPED, to_text(file.as_posix()), to_class_name(file.parts[0]) if file.parts[1:] else "", reason)
        for file, reason in sorted(files.items())
    ]


def list_class_folders(folder: Path, skipped: dict[Path, str] | None = None) -> list[Path]:
    """Return the class folders in a folder, which may be links; add everything else to `skipped`, with the reason."""
    skipped = {} if skipped is None else skipped
    folders = []
    for path in list_visible(folder):
        is_folder = path.is_dir()
        if reason := explain_clutter(path.name, is_folder):
            skipped[path] = reason
        elif not is_folder:
            skipped[path] = "not in a class folder"
        elif is_link(path) and is_listed_elsewhere(path, folder):
            skipped[path] = "a link to the image folder, to one that contains it, or to another class"
        else:
            folders.append(path)
    return folders


def is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link, or a Windows junction, which Python 3.11 cannot recognize."""
    return path.is_symlink() or getattr(os.path, "isjunction", lambda _: False)(path)


def is_listed_elsewhere(link: Path, folder: Path) -> bool:
    """Return whether a link in a folder leads to the folder itself, to a parent, or to a visible folder inside it."""
    target, parent = Path(os.path.realpath(link)), Path(os.path.realpath(folder))
    if parent.is_relative_to(target):
        return True
    return target.is_relative_to(parent) and not any(map(is_hidden, map(Path, target.relative_to(parent).parts)))


def walk(folder: Path, unreadable: list[Path] | None = None, skipped: dict[Path, str] | None = None) -> Iterator[Path]:
    """Yield the visible files in a folder and its subfolders, sorted; links to folders are not followed.

    Append unreadable folders to `unreadable`; without that list, raise OSError. Add the files and folders of
    operating systems and other programs to `skipped`, with the reason.
    """
    folders: list[Iterator[Path]] = []  # those being listed: the folder, a subfolder, a subfolder of that

    def enter(path: Path) -> None:
        try:
            folders.append(list_visible(path))
        except OSError:
            if unreadable is None:
                raise
            unreadable.append(path)

    enter(folder)
    while folders:
        if (path := next(folders[-1], None)) is None:
            folders.pop()
            continue
        is_folder = os.path.isdir(path)  # unlike Path.is_dir(), it never raises
        if reason := explain_clutter(path.name, is_folder):
            if skipped is not None:
                skipped[path] = reason
        elif is_folder and not is_link(path):
            enter(path)
        else:
            yield path


def is_image_file(path: Path) -> bool:
    """Return whether a path may be an image: a file, or a broken link, which is reported as unreadable later."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def list_visible(folder: Path) -> Iterator[Path]:
    """Return the files and folders in a folder, sorted by name, without hidden ones; see is_hidden().

    The paths are created one at a time: they take five times the memory of the names.
    """
    names = sorted(os.listdir(folder))
    return (path for path in map(folder.joinpath, names) if not is_hidden(path))


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
        class_name = to_class_name(path.relative_to(folder).parts[0])
        try:
            if reason := explain_stand_in(path):
                return ImageFile(file, class_name, "").with_reason(reason, is_permanent=False)
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

    Within a class, the first file is used. An image that is in two classes is skipped in both.
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
        class_images = [image for image in images if image.class_name == name]
        usable = sum(not image.reason for image in class_images)
        if usable < MIN_IMAGES_PER_CLASS:
            reasons = [f"{image.file}: {image.reason}" for image in class_images if image.reason]
            message = f"class {name} has {usable} usable image(s), but {MIN_IMAGES_PER_CLASS} are needed"
            raise WorkflowError("; ".join([message, *reasons[:3]]))
