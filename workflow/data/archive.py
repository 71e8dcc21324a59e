"""Unpack a ZIP file of class folders into the state folder. A malicious file can write nowhere else.

The folder is named after the digest of the ZIP file, so a file is unpacked once, and again if it changes.
"""

import hashlib
import os
import re
import shutil
import tempfile
import time
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from workflow.data.folder import list_images
from workflow.data.other_files import explain_clutter, is_hidden
from workflow.errors import WorkflowError, explain_os_errors
from workflow.files import MAX_FILE_BYTES, file_size

MAX_FILES = 200_000
MAX_BYTES = 100_000_000_000  # of all files, unpacked
MAX_RATIO = 100  # of all files to the ZIP file; photos hardly shrink
SMALL_BYTES = 100_000_000  # files that are smaller in total may have any ratio: drawings on white compress well
LEFTOVER_SECONDS = 86_400  # older partial folders are from killed processes
LAYOUT_DEPTH = 3  # levels of folders that list_images() checks
UTF_8, ENCRYPTED = 0x800, 0x1  # bits of a file's flags
DRIVE = re.compile(r"^[A-Za-z]:")
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')  # in names on Windows
FAILURES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, LookupError)
Members = dict[PurePosixPath, zipfile.ZipInfo]  # by the path in the folder to unpack to


def is_archive(path: Path) -> bool:
    """Return whether a path is a ZIP file, according to its content or its name."""
    return os.path.isfile(path) and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path))


def unpack(path: Path, folder: Path) -> int:
    """Unpack a ZIP file to a folder unless it is already unpacked, and return the number of files.

    Raises:
        WorkflowError: the file is damaged, protected, too large or not safe, or the disk is full
    """
    with open_archive(path) as archive:
        members = list_members(path, archive)
        if not is_unpacked(members, folder):
            part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
            with explain_os_errors(folder):
                try:
                    write_members(archive, members, part)
                    replace_folder(part, folder, members)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    return len(members)


def is_unpacked(members: Members, folder: Path) -> bool:
    """Return whether the folder has all files."""
    return all(file_size(folder / name) == member.file_size for name, member in members.items())


def write_members(archive: zipfile.ZipFile, members: Members, folder: Path) -> None:
    """Write the files to a new folder; links become files that contain their target."""
    for name, member in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, open(folder / name, "xb") as target:
            shutil.copyfileobj(source, target)


def replace_folder(part: Path, folder: Path, members: Members) -> None:
    """Replace the missing or incomplete folder, unless another run has done so, and remove old partial folders."""
    for leftover in folder.parent.glob("zip-*.part"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        part.rename(folder)
    except OSError:
        if not is_unpacked(members, folder):
            raise


def check_archive(path: Path) -> None:
    """Raise WorkflowError if the list of files shows that a ZIP file cannot be unpacked, or has no class folders."""
    with open_archive(path) as archive, tempfile.TemporaryDirectory() as folder:
        examples: dict[tuple[str, ...], PurePosixPath] = {}  # a file of each kind in each folder
        for name in list_members(path, archive):
            examples.setdefault((*name.parts[:-1][:LAYOUT_DEPTH], name.suffix), name)
        for (*parents, _), name in examples.items():
            example = Path(folder, *parents, name.name)
            example.parent.mkdir(parents=True, exist_ok=True)
            example.write_bytes(b"1")
        try:
            list_images(Path(folder))
        except WorkflowError as error:
            raise WorkflowError(str(error).replace(folder, str(path))) from None


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a ZIP file; raise WorkflowError for any failure to read it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except WorkflowError:
        raise
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read: {error.strerror or error}") from error
    except NotImplementedError as error:
        raise WorkflowError(f"{path} cannot be read: {error}; unpack it yourself, and use the folder") from error
    except FAILURES as error:
        raise WorkflowError(f"{path} is damaged or not a ZIP file ({error}); copy or download it again") from error


def list_members(path: Path, archive: zipfile.ZipFile) -> Members:
    """Return the files to unpack, without system files, and without a folder that contains all others.

    Raises:
        WorkflowError: the ZIP file is protected, too large or not safe
    """
    infos = [info for info in archive.infolist() if not info.is_dir()]
    members: Members = {}
    spellings: dict[str, str] = {}  # by path as Windows and macOS compare it
    for info in infos:
        name = safe_path(path, decode_name(info))
        *folders, _ = (PurePosixPath(part) for part in name.parts)
        if any(is_hidden(part) or explain_clutter(part.name, is_folder=True) for part in folders):
            continue
        if is_hidden(PurePosixPath(name.name)):
            continue
        for spelling in map(str, [name, *name.parents]):
            first = spellings.setdefault(unicodedata.normalize("NFC", spelling).casefold(), spelling)
            if first != spelling:
                refuse(path, f"contains both {first} and {spelling}, which Windows and macOS cannot tell apart")
        if name in members:
            refuse(path, f"contains {name} twice")
        members[name] = info
    if both := members.keys() & {parent for name in members for parent in name.parents}:
        refuse(path, f"contains both a file and a folder named {both.pop()}")
    check_limits(path, list(members.values()))
    return remove_top_folder(members)


def check_limits(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Raise WorkflowError if the files to unpack are protected by a password, too many or too large."""
    if not infos:
        raise WorkflowError(f"{path} contains no files; --source needs one folder of images per class")
    if any(info.flag_bits & ENCRYPTED for info in infos):
        raise WorkflowError(f"{path} is protected by a password; unpack it yourself, and use the folder")
    total, largest = sum(info.file_size for info in infos), max(infos, key=lambda info: info.file_size)
    if len(infos) > MAX_FILES or total > MAX_BYTES:
        refuse(path, f"has {len(infos):,} files and {total:,} bytes; the limits are {MAX_FILES:,} and {MAX_BYTES:,}")
    if largest.file_size > MAX_FILE_BYTES:
        refuse(path, f"has a file of {largest.file_size:,} bytes; the limit is {MAX_FILE_BYTES:,}")
    if total > max(SMALL_BYTES, MAX_RATIO * file_size(path)):
        refuse(path, f"would grow to {total:,} bytes, more than {MAX_RATIO} times its size")


def refuse(path: Path, problem: str) -> None:
    """Raise WorkflowError for a ZIP file that is not safe to unpack."""
    raise WorkflowError(f"{path} {problem}; if you trust it, unpack it yourself, and use the folder")


def decode_name(info: zipfile.ZipInfo) -> str:
    """Return the name of a file. Without the UTF-8 flag, it may still be UTF-8 (macOS), or else code page 437."""
    if info.flag_bits & UTF_8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def safe_path(path: Path, name: str) -> PurePosixPath:
    """Return the path of a file in the folder to unpack to; characters that Windows forbids become underscores.

    Raises:
        WorkflowError: the path would lead out of the folder
    """
    parts = name.replace("\\", "/").split("/")  # old programs for Windows write backslashes
    if parts[0] == "" or ".." in parts or DRIVE.match(parts[0]):
        refuse(path, f"contains the path {name}, which leads out of the folder")
    return PurePosixPath(*(FORBIDDEN.sub("_", part) for part in parts if part not in ("", ".")))


def remove_top_folder(members: Members) -> Members:
    """Return the members without the folders that contain all others, as long as there are folders below."""
    while len({name.parts[0] for name in members}) == 1 and any(len(name.parts) > 2 for name in members):
        members = {name.relative_to(name.parts[0]): info for name, info in members.items()}
    return members


def archive_folder(path: Path, parent: Path) -> Path:
    """Return the folder for the files of a ZIP file, which is named after its content; it may not exist yet."""
    try:
        with open(path, "rb") as file:
            return parent / f"zip-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read: {error.strerror or error}") from error
