"""The shrunk copies of images, which the small network learns from: each image is shrunk once, and kept.

A copy is a file of its own, named after the image's digest: the SHA-256 of the pixels, then the pixels. It is verified
each time that it is used, and made anew when it is not whole.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workflow import image_classifier
from workflow.data.verified_image import read_verified
from workflow.files import sha256, write_whole
from workflow.records import ImageFile
from workflow.text import locate

import numpy as np
import PIL

DIGEST_BYTES = 32  # at the beginning of each copy


def load_shrunk(
    images: list[ImageFile], folder: Path, cache: Path, size: int
) -> tuple[list[ImageFile], dict[str, Path]]:
    """The image files, with the reason where one cannot be used, and the shrunk copies of the others by digest.

    The copies lie in `cache`, in a folder for the size, the version of Pillow and the way in which images are read.
    """
    code = Path(image_classifier.__file__).read_text(encoding="utf-8")
    store = cache / f"shrunk-{size}-{sha256([PIL.__version__, code])[:12]}"

    def shrink(image: ImageFile) -> ImageFile:
        copy = store / f"{image.digest}.pixels"
        if image.reason or is_whole(copy, size):
            return image
        pixels, is_permanent = read_verified(image.digest, locate(folder, image.file), size)
        if isinstance(pixels, str):
            return image.with_reason(pixels, is_permanent)
        content = pixels.tobytes()
        write_whole(copy, hashlib.sha256(content).digest() + content, durable=False)
        return image

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(shrink, images))
    return images, {image.digest: store / f"{image.digest}.pixels" for image in images if not image.reason}


def is_whole(copy: Path, size: int) -> bool:
    """Whether a shrunk copy is there, and as it was written."""
    try:
        content = copy.read_bytes()
    except OSError:
        return False
    digest, pixels = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return len(pixels) == size * size * 3 and hashlib.sha256(pixels).digest() == digest


def read_pixels(copy: Path) -> np.ndarray:
    """The pixels of a shrunk copy: uint8, shape (size, size, 3)."""
    pixels = np.frombuffer(copy.read_bytes(), "uint8", offset=DIGEST_BYTES)
    size = round((len(pixels) / 3) ** 0.5)
    return pixels.reshape(size, size, 3)
