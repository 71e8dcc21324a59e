"""Make text safe to store and print: file names with arbitrary bytes, control characters, and passwords in URLs."""

import os
import re
import unicodedata
from pathlib import Path


def to_text(name: str | os.PathLike[str]) -> str:
    """Return a file name as text that JSON and databases can store: bytes that are not UTF-8 become \\xNN.

    Different names yield different text, because a literal backslash before such a sequence is escaped as well.
    """
    return re.sub(rb"\\(?=x[0-9a-f]{2})", rb"\\x5c", os.fsencode(name)).decode(errors="backslashreplace")


def from_text(text: str) -> Path:
    """Return the path that a text represents; the inverse of to_text()."""
    content = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), os.fsencode(text))
    return Path(os.fsdecode(content))


def to_class_name(folder_name: str) -> str:
    """Return the class name of a folder in NFC, so that é is one character even if macOS stores it as two."""
    return unicodedata.normalize("NFC", to_text(folder_name))


def printable(text: str) -> str:
    """Replace each unprintable character, such as ESC or a newline, with its escape sequence."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def hide_passwords(text: str) -> str:
    """Remove passwords from all URLs in the text: http://ann:secret@host becomes http://ann@host.

    Only SQLAlchemy database URLs allow a slash in the password.
    """
    text = re.sub(r"(https?://[^/\s:@]*):[^/\s]*@", r"\1@", text)
    return re.sub(r"(?<!\w)(?!https?:)(\w[\w+.-]*://[^/\s:@]*):[^\s@]*@", r"\1@", text)
