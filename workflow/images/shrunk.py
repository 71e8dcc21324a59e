"""The shrunk copies of the images of a folder, which the small network learns from: each image is shrunk once."""

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from workflow.errors import explain_os_errors
from workflow.files import sha256
from workflow.model.image_classifier import read_image
from workflow.records import ImageFile

import numpy as np
import PIL
from PIL import Image


def load_shrunk(
    images: list[ImageFile], folder: Path, into: Path, size: int
) -> tuple[list[ImageFile], dict[str, Path]]:
    """The image files, with the reason where one cannot be used, and the shrunk copies of the others by digest.

    The copies are named DIGEST.bmp. They lie in a folder of `into` that is made once for these image files, the size
    and the version of Pillow.
    """
    rows = [asdict(image) for image in images]
    prepared = into / f"prepared-{size}-{PIL.__version__}-{sha256(rows)[:12]}"
    if not prepared.exists():
        shrink_images(folder, images, prepared, size)
    reasons = json.loads((prepared / "reasons.json").read_text())
    images = [replace(image, reason=reason) for image, reason in zip(images, reasons, strict=True)]
    return images, {image.digest: prepared / f"{image.digest}.bmp" for image in images if not image.reason}


def shrink_images(folder: Path, images: list[ImageFile], prepared: Path, size: int) -> None:
    """Makes `prepared`, whole or not at all: DIGEST.bmp for each usable image, and reasons.json for all.

    An image that was shrunk before, in a folder whose name differs in its last part alone, is linked from there.
    """
    known = {path.name: path for path in prepared.parent.glob(f"{prepared.name.rpartition('-')[0]}-*/*.bmp")}

    def shrink(image: ImageFile) -> str:
        name = f"{image.digest}.bmp"
        try:
            if not image.reason and not link_known(known.get(name), part / name):
                Image.fromarray(read_image(folder / image.file, size)).save(part / name)
        except ValueError as error:
            return str(error)
        return image.reason

    with explain_os_errors(prepared):
        prepared.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=prepared.parent, prefix=".prepared-") as beside:
            part = Path(beside, "whole")
            part.mkdir()
            with ThreadPoolExecutor() as pool:
                (part / "reasons.json").write_text(json.dumps(list(pool.map(shrink, images))))
            try:
                os.rename(part, prepared)
            except OSError:
                if not prepared.exists():  # unless another run was first
                    raise


def link_known(known: Path | None, path: Path) -> bool:
    """Gives a known file a second name; False where it has gone, or where a disk allows a file only one name."""
    with suppress(OSError):
        if known:
            path.hardlink_to(known)
            return True
    return False


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of a shrunk copy: uint8, shape (size, size, 3)."""
    with Image.open(path) as image:
        return np.asarray(image)
