"""Write files atomically, read untrusted files safely, and compute digests."""

import errno
import hashlib
import io
import json
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from workflow.errors import WorkflowError, explain_os_errors

from filelock import FileLock, Timeout

MAX_FILE_BYTES = 500_000_000  # a larger file is unlikely to be an image, and could exhaust memory
BUFFER_BYTES = 1_000_000  # chunk size for computing a digest
SILENT_SECONDS = 10  # a longer wait for a lock is reported
T = TypeVar("T")


def sha256(content: object) -> str:
    """Return the SHA-256 of bytes, or of the JSON text of any other object."""
    return hashlib.sha256(content if isinstance(content, bytes) else json.dumps(content).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: write a temporary file and rename it. Create its folder if necessary.

    The content is flushed to disk before the rename, so a power failure leaves no partial file.

    Raises:
        WorkflowError: the file cannot be written
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, fallback_to_soft: bool = True) -> Iterator[None]:
    """Hold a file lock, and report after SILENT_SECONDS that another process, possibly suspended, holds it.

    Args:
        path: the lock file
        fallback_to_soft: whether to use the file's existence as the lock on a file system without locks
    """
    lock = FileLock(path, fallback_to_soft=fallback_to_soft)
    try:
        lock.acquire(timeout=SILENT_SECONDS)
    except Timeout:
        print(
            f"Waiting for another program of this project, which has locked {path}; if suspended, resume it with `fg`",
            file=sys.stderr,
            flush=True,
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def acquire_lock(path: Path, busy: str) -> AbstractContextManager[FileLock]:
    """Return an acquired file lock, which is released at the end of a `with` block.

    Raises:
        WorkflowError: another process holds the lock; `busy` is the message
    """
    try:
        return FileLock(path).acquire(blocking=False)
    except Timeout:
        raise WorkflowError(busy) from None


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write named arrays like numpy.savez(), but atomically."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


def read_file(path: Path | str) -> bytes:
    """Return the content of an untrusted file; raise OSError for files that open_checked() rejects."""
    with open(path, "rb", opener=open_checked) as file:
        return file.read(size_of(file))


def read_verified(source: Path | bytes, digest: str) -> bytes:
    """Return the content of a file, or the bytes themselves; raise OSError if their SHA-256 is not `digest`."""
    content = source if isinstance(source, bytes) else read_file(source)
    if sha256(content) != digest:
        raise OSError(errno.EIO, "its content has changed since the run started")
    return content


def digest_file(path: Path | str) -> str:
    """Return the SHA-256 of the content that read_file() returns, without loading the whole file."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=open_checked) as file:
        remaining = size_of(file)
        while part := file.read(min(remaining, BUFFER_BYTES)):
            digest.update(part)
            remaining -= len(part)
    return digest.hexdigest()


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file, but at least 1: reading 0 bytes would not reveal that a file is unreadable."""
    return max(os.fstat(file.fileno()).st_size, 1)


def open_checked(path: str, flags: int) -> int:
    """Open a file, as an opener for open(); raise OSError for pipes, devices and files larger than MAX_FILE_BYTES.

    Opening a pipe does not block.
    """
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    status, reason = os.fstat(file), ""
    if not stat.S_ISREG(status.st_mode):
        reason = "not a regular file"
    elif status.st_size > MAX_FILE_BYTES:
        reason = f"{status.st_size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}"
    if reason:
        os.close(file)
        raise OSError(errno.EINVAL, reason, path)
    return file


def file_size(path: Path | str) -> int:
    """Return the size of a file in bytes, or 0 if it is missing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def group(items: Iterable[T], size: Callable[[T], int], max_items: int, max_bytes: int) -> Iterator[list[T]]:
    """Split items into groups of at most `max_items` and `max_bytes`; an item that is too large gets its own group.

    Args:
        items: the items; their order is kept
        size: returns the size of an item in bytes
        max_items: maximum number of items per group
        max_bytes: maximum size of a group in bytes
    """
    batch: list[T] = []
    total = 0
    for item in items:
        length = size(item)
        if batch and (len(batch) == max_items or total + length > max_bytes):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += length
    if batch:
        yield batch
