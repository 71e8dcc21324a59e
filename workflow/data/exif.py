"""Read the camera and time of a photo from its EXIF data.

Sessions are derived from them. For privacy, only the five fields below are read; the GPS position, names of people and
all other EXIF data are neither read nor stored. Serial numbers are stored as digests only.

JPEG and TIFF files are parsed here because Pillow (13.0) prints warnings for damaged EXIF data, and warnings cannot be
suppressed safely while other threads run. Pillow may still print a warning for a damaged AVIF file.
"""

import io
import re
import struct
from datetime import UTC, datetime
from typing import Final, NamedTuple

from workflow.files import sha256

from PIL import Image

VERSION = 1  # increase when read_capture() returns other values, so that cached features are recomputed
MAKE, MODEL = 0x010F, 0x0110  # tags in the first directory
EXIF_IFD = 0x8769  # in the first directory: the offset of the Exif directory, which has the tags below
TIME_TAGS = (0x9003, 0x9004)  # DateTimeOriginal, DateTimeDigitized; editing a photo changes DateTime (0x0132)
SERIAL_NUMBER = 0xA431  # of the camera body
NO_TIME: Final = -1
MIN_YEAR = 1990  # an earlier year, such as 1970 or 1980, is from a clock that was never set
MAX_TEXT_BYTES = 200  # a longer text is not the name of a camera
MAX_ENTRIES = 1000  # per directory
MAX_SEGMENTS = 1000  # of a JPEG file, before its pixels
HEADER = b"Exif\0\0"  # before the EXIF data in many formats
BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}  # of TIFF, by the first bytes
TEXT, LONG, IFD, UTF_8 = 2, 4, 13, 129  # types of fields
TIME = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", re.ASCII)
Directory = dict[int, tuple[int, int, bytes]]  # by tag: type, count, and value or its offset


class Capture(NamedTuple):
    """The camera and time of a photo.

    Attributes:
        camera: make, model, and a digest of the serial number, such as "NIKON D750 (body 3f2a91)"; "" when unknown
        time: seconds since 1970 by the camera's clock, ignoring its time zone; NO_TIME if unknown
    """

    camera: str = ""
    time: int = NO_TIME


def read_capture(content: bytes) -> Capture:
    """Return the camera and time of an image file, unknown if its EXIF data are missing or damaged."""
    try:
        block = extract_block(content).removeprefix(HEADER)
        order = BYTE_ORDERS[block[:4]]
        main = read_directory(block, order, *struct.unpack_from(order + "I", block, 4))
        kind, _, offset = main.get(EXIF_IFD, (0, 0, b""))
        inner = read_directory(block, order, *struct.unpack(order + "I", offset)) if kind in (LONG, IFD) else {}
        make, model = (read_text(block, order, main.get(tag)) for tag in (MAKE, MODEL))
        serial, *times = (read_text(block, order, inner.get(tag)) for tag in (SERIAL_NUMBER, *TIME_TAGS))
        original, digitized = map(parse_time, times)
    except Exception:  # Pillow may raise any exception for malformed files
        return Capture()
    return Capture(name_camera(make, model, serial), digitized if original == NO_TIME else original)


def extract_block(content: bytes) -> bytes:
    """Return the EXIF data of an image file, in the layout of a TIFF file; b"" if there is none."""
    if content[:4] in BYTE_ORDERS:
        return content
    if content.startswith(b"\xff\xd8"):
        return extract_from_jpeg(content)
    with Image.open(io.BytesIO(content), formats=("PNG", "WEBP", "AVIF")) as image:
        return image.info.get("exif", b"")


def extract_from_jpeg(content: bytes) -> bytes:
    """Return the EXIF data of a JPEG or MPO (multi-picture) file; b"" if there is none."""
    start = 2
    for _ in range(MAX_SEGMENTS):
        marker, length = struct.unpack_from(">HH", content, start)
        if marker == 0xFFFF:  # padding
            start += 1
        elif marker == 0xFFE1 and content.startswith(HEADER, start + 4):
            return content[start + 4 : start + 2 + length]
        elif marker < 0xFFC0 or marker == 0xFFDA:  # damage, or the beginning of the pixels
            break
        else:
            start += 2 + length
    return b""


def read_directory(block: bytes, order: str, offset: int) -> Directory:
    """Return the fields of the directory at the offset; raise struct.error if it is truncated."""
    count = min(*struct.unpack_from(order + "H", block, offset), MAX_ENTRIES)
    entries = (struct.unpack_from(order + "HHI4s", block, offset + 2 + 12 * number) for number in range(count))
    return {tag: (kind, length, value) for tag, kind, length, value in entries}


def read_text(block: bytes, order: str, field: tuple[int, int, bytes] | None) -> str:
    """Return a text without padding and unprintable characters; "" if it is missing, damaged or too long."""
    kind, length, value = field or (0, 0, b"")
    if kind not in (TEXT, UTF_8) or length > MAX_TEXT_BYTES:
        return ""
    if length > len(value):
        (offset,) = struct.unpack(order + "I", value)
        value = block[offset : offset + length]
    text = value[:length].split(b"\0")[0].decode("utf-8", "ignore") if len(value) >= length else ""
    return " ".join("".join(filter(str.isprintable, text)).split())


def name_camera(make: str, model: str, serial: str) -> str:
    """Return make and model, without a make that the model repeats, and a digest of the serial number."""
    repeated = bool(make) and model.lower().startswith(make.lower().split()[0])
    name = model if repeated else f"{make} {model}".strip()
    return f"{name} (body {sha256(serial)[:6]})" if name and serial else name


def parse_time(text: str) -> int:
    """Return the seconds since 1970 of a time such as 2024:05:01 14:03:00; NO_TIME for an impossible time."""
    if not (match := TIME.match(text)):
        return NO_TIME
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return NO_TIME
    return int(moment.timestamp()) if moment.year >= MIN_YEAR else NO_TIME
