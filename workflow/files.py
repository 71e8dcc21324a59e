"""Files that are written whole or not at all, and digests."""

import hashlib
import json
import os
import uuid
from pathlib import Path

from workflow.errors import explain_os_errors


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
