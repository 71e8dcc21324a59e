"""EXIF data: camera and time are read from files of each format, and damaged data are ignored silently."""

import io
import struct
import warnings
from datetime import UTC, datetime

from support import exif as fields
from support.exif import make_exif, phone
from workflow.data import exif
from workflow.data.exif import Capture, read_capture
from workflow.data.features import decode

import pytest
from PIL import Image

PHONE = Capture("Apple iPhone 12", int(datetime(2024, 5, 1, 14, 3, tzinfo=UTC).timestamp()))
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF")


def save(data: Image.Exif | bytes, kind: str = "JPEG") -> bytes:
    """Return a small image file with the EXIF data."""
    content, image = io.BytesIO(), Image.new("RGB", (16, 16), "red")
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]} if kind == "MPO" else {}
    image.save(content, kind, exif=data if isinstance(data, bytes) else data.tobytes(), **more)
    return content.getvalue()


def read(main: dict[int, object], inner: dict[int, object]) -> Capture:
    return read_capture(save(make_exif(main, inner)))


@pytest.mark.parametrize("kind", FORMATS)
def test_camera_and_time_are_read_from_each_format(kind):
    assert read_capture(save(phone(), kind)) == PHONE


@pytest.mark.parametrize("kind", [*FORMATS, "GIF", "BMP"])
def test_file_without_exif_data_has_no_camera_or_time(kind):
    content = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(content, kind)
    assert read_capture(content.getvalue()) == Capture("", exif.NO_TIME)


def test_little_endian_data_are_read():
    block = struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, fields.MODEL, 2, 4, b"X1\0\0", 0)
    assert read_capture(save(b"Exif\0\0" + block)) == Capture("X1")


def test_exif_data_after_other_jpeg_segments_are_read():
    content = save(phone())
    comment, padding = b"\xff\xfe\x00\x06text", b"\xff\xff"
    assert read_capture(content[:2] + comment + padding + content[2:]) == PHONE


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("Apple", "iPhone 12", "Apple iPhone 12"),
        ("Canon", "Canon EOS R5", "Canon EOS R5"),
        ("NIKON CORPORATION", "NIKON D750", "NIKON D750"),
        ("  Sony\0\0", "\x1b[31mA7\n \0junk", "Sony [31mA7"),
        ("Apple", "", "Apple"),
        ("", "X1", "X1"),
        ("", "", ""),
    ],
)
def test_camera_is_make_and_model_without_padding(make, model, camera):
    assert read({fields.MAKE: make, fields.MODEL: model}, {}).camera == camera


def test_camera_bodies_differ_without_storing_serial_numbers():
    cameras = {read({fields.MODEL: "X1"}, {fields.SERIAL_NUMBER: f"SECRET-{n}"}).camera for n in (1, 2)}
    assert len(cameras) == 2
    assert all(camera.startswith("X1 (body ") and "SECRET" not in camera for camera in cameras)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({fields.ORIGINAL_TIME: "2024:05:01 14:03:00.25"}, PHONE.time),
        ({fields.ORIGINAL_TIME: "2024-05-01T14:03:00"}, PHONE.time),
        ({fields.DIGITIZED_TIME: "2024:05:01 14:03:00"}, PHONE.time),
        ({fields.ORIGINAL_TIME: "0000:00:00 00:00:00", fields.DIGITIZED_TIME: "2024:05:01 14:03:00"}, PHONE.time),
        ({fields.ORIGINAL_TIME: "2024:05:01 14:03:00", fields.DIGITIZED_TIME: "2025:01:01 00:00:00"}, PHONE.time),
        ({fields.DATE_TIME: "2024:05:01 14:03:00"}, exif.NO_TIME),
        ({fields.ORIGINAL_TIME: "2024:02:30 14:03:00"}, exif.NO_TIME),
        ({fields.ORIGINAL_TIME: "2024:05:01 24:00:00"}, exif.NO_TIME),
        ({fields.ORIGINAL_TIME: "    :  :     :  :  "}, exif.NO_TIME),
        ({fields.ORIGINAL_TIME: "1980:01:01 00:00:00"}, exif.NO_TIME),
        ({fields.ORIGINAL_TIME: "yesterday"}, exif.NO_TIME),
        ({fields.ORIGINAL_TIME: 20240501}, exif.NO_TIME),
        ({}, exif.NO_TIME),
    ],
)
def test_time_is_the_first_valid_time_of_the_capture(times, expected):
    assert read({fields.MODEL: "X1"}, times) == Capture("X1", expected)


@pytest.mark.survived("EXIF: a string that is too long, or a number instead of a string")
def test_value_that_is_not_a_short_string_is_ignored():
    assert read({fields.MODEL: "x" * 60_000, fields.MAKE: "Apple"}, {}).camera == "Apple"
    number = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, fields.MODEL, 3, 1, 7, 0, 0)
    assert read_capture(save(b"Exif\0\0" + number)) == Capture()


@pytest.mark.survived("EXIF: a photo is truncated anywhere, or any bit of its EXIF data has changed")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_damaged_data_are_ignored(kind):
    content = save(phone(), kind)
    start = content.index(b"MM\0*" if kind != "TIFF" else b"II*\0")
    changes = [(place, 1 << bit) for place in range(start, min(start + 250, len(content))) for bit in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as settings.py does
        results = [read_capture(content[:length]) for length in range(start + 250)]
        for place, bit in changes:
            changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            results.append(read_capture(changed))
    assert Capture() in results
    assert all(len(camera) <= 2 * exif.MAX_TEXT_BYTES and camera.isprintable() for camera, _ in results)


@pytest.mark.survived("EXIF: data crafted to fill memory or to loop")
@pytest.mark.parametrize(
    "block",
    [
        b"MM\0*" + struct.pack(">I", 8) + struct.pack(">HHHII", 0xFFFF, fields.EXIF_IFD, 4, 1, 8) * 2,
        b"MM\0*" + struct.pack(">IHHHII", 8, 1, fields.MODEL, 2, 0xFFFFFFFF, 0),
        b"MM\0*" + struct.pack(">IHHHII", 8, 1, fields.EXIF_IFD, 4, 1, 0xFFFFFFFF),
        b"MM\0*" + b"\xff" * 60_000,
        b"MM",
    ],
)
def test_hostile_data_are_ignored(block):
    segment = b"Exif\0\0" + block
    content = save(phone())[:2] + struct.pack(">HH", 0xFFE1, 2 + len(segment)) + segment + save(phone())[2:]
    assert read_capture(content) == Capture()


def test_photo_with_damaged_exif_data_is_usable():
    content = save(phone()).replace(b"MM\0*", b"XX\0*")
    assert read_capture(content) == Capture()
    pixels, capture = decode(exif.sha256(content), content, 8)
    assert (pixels.shape, capture) == ((8, 8, 3), Capture())
