"""Synthetic photos for benchmarks."""

import io
from pathlib import Path

import draw

import numpy as np

MAX_ORIGINALS = 20  # per class; further photos are copies with a few different bytes after the image
SIZES = [1000] * 19 + [4000]  # longer side in pixels, in turn; every twentieth has the size of a phone photo


def write_photos(folder: Path, count: int, sizes: list[int] = SIZES, originals: int = MAX_ORIGINALS) -> None:
    """Write photos with different contents.

    Args:
        folder: gets one folder per class
        count: of photos in both classes together
        sizes: longer sides in pixels, in turn
        originals: images to draw per class
    """
    bodies = {}
    for label, kind in enumerate(("apples", "oranges")):
        (folder / kind).mkdir(parents=True)
        for number in range(min(originals, count // 2)):
            file = io.BytesIO()
            size = sizes[number % len(sizes)]
            draw.draw(kind, size, np.random.default_rng([size, label, number])).save(file, "JPEG", quality=90)
            bodies[kind, number] = file.getvalue()
    for number in range(count // 2):
        for kind in ("apples", "oranges"):
            (folder / kind / f"{number:05}.jpeg").write_bytes(
                bodies[kind, number % originals] + number.to_bytes(4, "big")
            )


def draw_image(number: int, size: int):
    """Return the image for a number; apples and oranges alternate."""
    return draw.draw(("apples", "oranges")[number % 2], size, np.random.default_rng(number))
