"""Files that are written whole or not at all, files that others have made, and digests."""

import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from workflow.errors import explain_os_errors

MAX_FILE_BYTES = 500_000_000  # a larger file is no photo, and would fill the memory
T = TypeVar("T")


def sha256(content: object) -> str:
    """The SHA-256 of bytes, or of anything that JSON can write."""
    return hashlib.sha256(content if isinstance(content, bytes) else json.dumps(content).encode()).hexdigest()


def write_whole(path: Path, content: bytes, durable: bool = True) -> None:
    """Writes a file beside its place and renames it, so that nobody ever sees a part of it.

    A durable file is whole also after a power failure; that costs some milliseconds. Raises WorkflowError, which names
    the path, when it cannot be written.
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read_file(path: Path | str) -> bytes:
    """The content of a file that somebody else may have made.

    Raises OSError for what is no file, such as a pipe, for which nobody should wait, and for more than MAX_FILE_BYTES.
    """
    with open(path, "rb", opener=open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        if status.st_size > MAX_FILE_BYTES:
            told = f"{status.st_size:,} bytes: more than {MAX_FILE_BYTES:,} are refused"
            raise OSError(errno.EFBIG, told, str(path))
        return file.read(status.st_size)


def open_without_waiting(path: str, flags: int) -> int:
    """For open(): a pipe is opened at once, whether or not somebody writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def file_size(path: Path | str) -> int:
    """The bytes in a file; 0 when there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def group(items: Iterable[T], size: Callable[[T], int], most: int, most_bytes: int) -> Iterator[list[T]]:
    """The items in groups of `most` at most, and of `most_bytes` together unless a single one is larger."""
    gathered: list[T] = []
    total = 0
    for item in items:
        length = size(item)
        if gathered and (len(gathered) == most or total + length > most_bytes):
            yield gathered
            gathered, total = [], 0
        gathered.append(item)
        total += length
    if gathered:
        yield gathered
