"""Read the camera and time of a photo from its EXIF data.

Sessions are derived from them. For privacy, only the five fields below are used; the position (GPS), the names of
people and all other EXIF data are neither used nor stored. Of a serial number, only a digest is stored.
"""

import io
import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

from workflow.files import sha256

from PIL import Image
from PIL.ExifTags import IFD, Base

VERSION = 1  # increase when read_capture() returns other values: cached features are then computed again
NO_TIME: Final = -1
MIN_YEAR = 1990  # an earlier year, such as 1970 or 1980, is from a clock that was never set
MAX_TEXT_BYTES = 200  # a longer text is not the name of a camera
TIME = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", re.ASCII)


class Capture(NamedTuple):
    """The camera and time of a photo."""

    camera: str = ""  # with a digest of its serial number: "NIKON D750 (body 3f2a91)"; "" when unknown
    time: int = NO_TIME  # seconds since 1970 by the clock of the camera, ignoring its time zone; NO_TIME when unknown


def read_capture(content: bytes) -> Capture:
    """Return the camera and time of an image file, unknown if its EXIF data are missing or damaged."""
    try:
        main = read_exif(content)
        inner = main.get_ifd(IFD.Exif)
        make, model = (clean(main.get(tag)) for tag in (Base.Make, Base.Model))
        serial = clean(inner.get(Base.BodySerialNumber))
        # Editing a photo changes Base.DateTime.
        original, digitized = (parse_time(inner.get(tag)) for tag in (Base.DateTimeOriginal, Base.DateTimeDigitized))
    except Exception:  # Pillow raises almost anything for hostile bytes
        return Capture()
    return Capture(name_camera(make, model, serial), digitized if original == NO_TIME else original)


def read_exif(content: bytes) -> Image.Exif:
    """Return the EXIF data of an image file, without decoding its pixels as getexif() may do."""
    exif = Image.Exif()
    if content.startswith((b"II*\0", b"MM\0*")):  # EXIF data have the layout of a TIFF file
        exif.load(content)
    else:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP", "AVIF")) as image:
            exif.load(image.info.get("exif", b""))
    return exif


def clean(value: object) -> str:
    """Return a text without padding and unprintable characters; "" when it is missing, not a text, or too long."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_BYTES:
        return ""
    text = value.split("\0")[0].encode("latin-1").decode("utf-8", "ignore")  # Pillow decodes it as Latin-1
    return " ".join("".join(filter(str.isprintable, text)).split())


def name_camera(make: str, model: str, serial: str) -> str:
    """Return make and model, without a make that the model repeats, and a digest of the serial number."""
    repeated = bool(make) and model.lower().startswith(make.lower().split()[0])
    name = model if repeated else f"{make} {model}".strip()
    return f"{name} (body {sha256(serial)[:6]})" if name and serial else name


def parse_time(value: object) -> int:
    """Return the seconds since 1970 of a time such as 2024:05:01 14:03:00; NO_TIME for an impossible time."""
    if not (match := TIME.match(clean(value))):
        return NO_TIME
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return NO_TIME
    return int(moment.timestamp()) if moment.year >= MIN_YEAR else NO_TIME
