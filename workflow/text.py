"""Names of files as text: they may hold any bytes, and anything that a terminal takes for a command."""

import os
import re
from pathlib import Path


def to_text(name: str | os.PathLike[str]) -> str:
    """The name of a file as text that can be stored, another one for each name: a byte that is no UTF-8 becomes \\xNN.

    So does a backslash in front of what looks like such a byte.
    """
    return re.sub(rb"\\(?=x[0-9a-f]{2})", rb"\\x5c", os.fsencode(name)).decode(errors="backslashreplace")


def from_text(text: str) -> Path:
    """The path whose name to_text() has given."""
    content = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), os.fsencode(text))
    return Path(os.fsdecode(content))


def locate(folder: str | Path, file: str) -> Path:
    """The path of a file; to_text() has given its name, and that of a folder that is no path."""
    return (from_text(folder) if isinstance(folder, str) else folder) / from_text(file)


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
