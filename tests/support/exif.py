"""EXIF data for test images."""

from PIL import Image

MAKE, MODEL, DATE_TIME, EXIF_IFD = 0x010F, 0x0110, 0x0132, 0x8769
ORIGINAL_TIME, DIGITIZED_TIME, SERIAL_NUMBER = 0x9003, 0x9004, 0xA431


def make_exif(main: dict[int, object], inner: dict[int, object]) -> Image.Exif:
    """Return EXIF data with the fields `main` and, in the Exif IFD, the fields `inner`."""
    exif = Image.Exif()
    exif.update(main)
    exif[EXIF_IFD] = dict(inner)
    return exif


def phone(time: str = "2024:05:01 14:03:00", model: str = "iPhone 12") -> Image.Exif:
    """Return the EXIF data of a phone photo that was edited later."""
    return make_exif({MAKE: "Apple", MODEL: model, DATE_TIME: "2025:01:01 00:00:00"}, {ORIGINAL_TIME: time})
