"""Names of files as text: they may hold any bytes, and anything that a terminal takes for a command."""

import os
import re
from pathlib import Path


def to_text(name: str | os.PathLike[str]) -> str:
    """The name of a file as text that can be stored: a byte that is no UTF-8 becomes \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def locate(folder: str | Path, file: str) -> Path:
    """The path of a file whose name, and whose folder's name, to_text() has given."""
    path = Path(folder, file)
    if os.path.lexists(path):
        return path
    content = re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes([int(match[1], 16)]), os.fsencode(path))
    return Path(os.fsdecode(content))


def printable(text: str) -> str:
    """The text with each character that cannot be printed, such as ESC or a new line, as its escape sequence."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def hide_passwords(text: str) -> str:
    """The text with each URL in it without its password: http://ann:secret@host becomes http://ann@host.

    Nobody but SQLAlchemy takes a password with a slash in it, for databases alone.
    """
    text = re.sub(r"(https?://[^/\s:@]*):[^/\s]*@", r"\1@", text)
    return re.sub(r"(?<!\w)(?!https?:)(\w[\w+.-]*://[^/\s:@]*):[^\s@]*@", r"\1@", text)
