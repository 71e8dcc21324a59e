"""Drawn photos, as many as a benchmark needs."""

import io
from pathlib import Path

import draw

import numpy as np

DRAWN = 20  # originals per class; more photos are copies that differ in a few bytes behind the image
SIZES = [1000] * 19 + [4000]  # pixels on the longer side, in turn: every twentieth is as large as a phone's


def write_photos(folder: Path, count: int, sizes: list[int] = SIZES, drawn: int = DRAWN) -> None:
    """Writes `count` files, half of them per class, that decode like photos, differ in content and have these sizes."""
    bodies = {}
    for label, kind in enumerate(("apples", "oranges")):
        (folder / kind).mkdir(parents=True)
        for number in range(min(drawn, count // 2)):
            file = io.BytesIO()
            size = sizes[number % len(sizes)]
            draw.draw(kind, size, np.random.default_rng([size, label, number])).save(file, "JPEG", quality=90)
            bodies[kind, number] = file.getvalue()
    for number in range(count // 2):
        for kind in ("apples", "oranges"):
            (folder / kind / f"{number:05}.jpeg").write_bytes(bodies[kind, number % drawn] + number.to_bytes(4, "big"))


def draw_image(number: int, size: int):
    """A drawn image for a number: apples and oranges in turn."""
    return draw.draw(("apples", "oranges")[number % 2], size, np.random.default_rng(number))
