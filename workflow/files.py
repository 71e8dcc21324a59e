"""Files that are written whole or not at all, files that others have made, and digests."""

import errno
import hashlib
import io
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from workflow.errors import explain_os_errors

MAX_FILE_BYTES = 500_000_000  # a larger file is no photo, and would fill the memory
PART = 1_000_000  # bytes that are read at once, to digest them
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


def write_arrays(path: Path, *arrays: Any, **named: Any) -> None:
    """Writes arrays as numpy.savez() does, but whole or not at all; raises WorkflowError as write_whole() does."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, *arrays, **named)
    write_whole(path, content.getvalue())


def read_file(path: Path | str) -> bytes:
    """The content of a file that somebody else may have made; raises OSError as check_opened() does."""
    with open(path, "rb", opener=check_opened) as file:
        return file.read(told_size(file))


def digest_file(path: Path | str) -> str:
    """The SHA-256 of what read_file() gives, without having all of it in memory."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=check_opened) as file:
        left = told_size(file)
        while part := file.read(min(left, PART)):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def told_size(file: BinaryIO) -> int:
    """The bytes that an open file says it has; 1 for none, so that a file which cannot be read says so."""
    return max(os.fstat(file.fileno()).st_size, 1)


def check_opened(path: str, flags: int) -> int:
    """For open(): raises OSError for what is no file, such as a pipe, and for more than MAX_FILE_BYTES.

    A pipe is opened at once, whether or not somebody writes into it.
    """
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    status, reason = os.fstat(file), ""
    if not stat.S_ISREG(status.st_mode):
        reason = "not a file"
    elif status.st_size > MAX_FILE_BYTES:
        reason = f"{status.st_size:,} bytes: more than {MAX_FILE_BYTES:,} are refused"
    if reason:
        os.close(file)
        raise OSError(errno.EINVAL, reason, path)
    return file


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
