"""Photos per second of the small network's preprocessing, beside plain Pillow and beside the lab's way of reading.

    python benchmarks/preprocess.py [--photos 200] [--pixels 4000] [--epochs 10] [--rounds 5]

The lab's way is keras.utils.image_dataset_from_directory, which decodes every original in every epoch. Nothing is
trained: it is the reading that is compared, ours with the verification, the digests and the split. describe.py measures
the preprocessing for the backbone.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.machine import describe_machine
from lib.photos import write_photos
from lib.small_network import load_splits

import ml_workflow
from workflow.records import SPLITS

import keras
import numpy as np
from PIL import Image

SIZE, BATCH_SIZE = ml_workflow.SMALL_SIZE, ml_workflow.BATCH_SIZE
PILLOW, WHOLE, LAB = "plain Pillow, reduced scale", "plain Pillow, whole image", "the lab's way, one epoch"
OURS, AGAIN, EPOCHS = "preprocess", "preprocess again", "preprocess, then {} epochs"


def with_pillow(folder: Path, reduced: bool) -> None:
    """All images as pixels, decoded by as many threads as there are cores."""

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            if reduced:
                image.draft("RGB", (2 * SIZE, 2 * SIZE))
            image = image.convert("RGB")
            return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=2.0))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, folder.glob("*/*")))


def in_the_labs_way(folder: Path) -> None:
    """One epoch over the originals."""
    options = {"image_size": (SIZE, SIZE), "batch_size": BATCH_SIZE, "verbose": False}
    for _ in keras.utils.image_dataset_from_directory(folder, **options):
        pass


def with_ours(folder: Path, place: Path, epochs: int) -> None:
    """As preprocess_data() does it, and then that many epochs over all splits."""
    splits = load_splits(folder, place, *SPLITS)
    for _ in range(epochs):
        for split in splits:
            for _ in split:
                pass


def seconds(step, *arguments) -> float:
    start = time.perf_counter()
    step(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--pixels", type=int, default=4000, help="width and height of a photo")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "photos")
        write_photos(folder, arguments.photos, [arguments.pixels], synthetic=2)
        for number in range(arguments.rounds):
            once, more = Path(place, f"once-{number}"), Path(place, f"more-{number}")
            for name, step in (
                (PILLOW, [with_pillow, folder, True]),
                (OURS, [with_ours, folder, once, 0]),
                (AGAIN, [with_ours, folder, once, 0]),
                (WHOLE, [with_pillow, folder, False]),
                (LAB, [in_the_labs_way, folder]),
                (EPOCHS.format(arguments.epochs), [with_ours, folder, more, arguments.epochs]),
            ):
                figures.setdefault(name, []).append(seconds(*step))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    table = {name: float(np.median(rows)) for name, rows in figures.items()}
    size = f"{arguments.pixels} x {arguments.pixels}"
    print(f"{arguments.photos} JPEGs of {size} pixels, median of {arguments.rounds}; {describe_machine()}")
    print(f"{'':30}{'seconds':>9}{'photos per second':>19}{'per core':>10}{'rate beside Pillow':>20}")
    for name, took in table.items():
        rate = arguments.photos / took
        print(f"{name:30}{took:9.2f}{rate:19.1f}{rate / os.cpu_count():10.1f}{table[PILLOW] / took:20.2f}")
    ratio = arguments.epochs * table[LAB] / table[EPOCHS.format(arguments.epochs)]
    print(f"{arguments.epochs} epochs: {ratio:.1f} times as fast as the lab's way")


if __name__ == "__main__":
    main()
