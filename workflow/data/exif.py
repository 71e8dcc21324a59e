"""Read the camera and time of a photo from its EXIF data.

Sessions are derived from both. For privacy, only the five fields below are read; the GPS position, the names of people
and all other EXIF data are neither used nor stored. Serial numbers are stored only as digests.
"""

import io
import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

from workflow.files import sha256
from workflow.image_classifier import FORMATS

from PIL import Image
from PIL.ExifTags import IFD, Base

VERSION = 2  # increase when read_capture() returns different values, so that cached values are recomputed
NO_TIME: Final = -1
MIN_YEAR = 1990  # an earlier year, such as 1970 or 1980, comes from a clock that was never set
MAX_TEXT_BYTES = 200  # a longer string is not the name of a camera
TIME = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)", re.ASCII)


class Capture(NamedTuple):
    """The camera and time of a photo."""

    camera: str = ""  # with a digest of its serial number: "NIKON D750 (body 3f2a91)"; "" when unknown
    time: int = NO_TIME  # seconds since 1970 by the clock of the camera, ignoring its time zone; NO_TIME when unknown


def read_capture(content: bytes) -> Capture:
    """Return the camera and time of an image file; an empty Capture if its EXIF data are missing or damaged."""
    try:
        main = read_exif(content)
        inner = main.get_ifd(IFD.Exif)
        make, model = (clean(main.get(tag)) for tag in (Base.Make, Base.Model))
        serial = clean(inner.get(Base.BodySerialNumber))
        # Base.DateTime is not used, because editing a photo changes it.
        original, digitized = (parse_time(inner.get(tag)) for tag in (Base.DateTimeOriginal, Base.DateTimeDigitized))
    except Exception:  # Pillow may raise any exception for malicious files
        return Capture()
    return Capture(name_camera(make, model, serial), digitized if original == NO_TIME else original)


def read_exif(content: bytes) -> Image.Exif:
    """Return the EXIF data of an image file without decoding its pixels, which getexif() may do."""
    exif = Image.Exif()
    if content.startswith((b"II*\0", b"MM\0*")):  # EXIF data have the layout of a TIFF file
        exif.load(content)
    else:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            exif.load(image.info.get("exif", b""))
    return exif


def clean(value: object) -> str:
    """Return a string without padding or unprintable characters; "" if it is missing, too long or not a string."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_BYTES:
        return ""
    text = value.split("\0")[0].encode("latin-1").decode("utf-8", "ignore")  # Pillow decodes it as Latin-1
    return " ".join("".join(filter(str.isprintable, text)).split())


def name_camera(make: str, model: str, serial: str) -> str:
    """Return the make and model, without the make if the model includes it, and a digest of the serial number."""
    repeated = bool(make) and model.lower().startswith(make.lower().split()[0])
    name = model if repeated else f"{make} {model}".strip()
    return f"{name} (body {sha256(serial)[:6]})" if name and serial else name


def parse_time(value: object) -> int:
    """Convert a time such as 2024:05:01 14:03:00 to seconds since 1970; return NO_TIME if it is not plausible."""
    if not (match := TIME.match(clean(value))):
        return NO_TIME
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return NO_TIME
    return int(moment.timestamp()) if moment.year >= MIN_YEAR else NO_TIME
