"""Compare the speed of the small network's preprocessing with plain Pillow and with the lab's data loading.

    python benchmarks/preprocess.py [--photos 200] [--pixels 4000] [--epochs 10] [--rounds 5]

The lab uses keras.utils.image_dataset_from_directory, which decodes every original in every epoch. preprocess_data()
also verifies and splits the images, and computes their digests. Nothing is trained. feature_speed.py measures the
preprocessing for the backbone.
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
PILLOW, FULL, LAB = "plain Pillow, reduced scale", "plain Pillow, full scale", "the lab, one epoch"
OURS, EPOCHS = "preprocess", "preprocess, then {} epochs"


def read_with_pillow(folder: Path, is_reduced: bool) -> None:
    """Decode all images, with one thread per core."""

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            if is_reduced:
                image.draft("RGB", (2 * SIZE, 2 * SIZE))
            image = image.convert("RGB")
            return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=2.0))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read, folder.glob("*/*")))


def read_like_lab(folder: Path) -> None:
    """Read one epoch as the lab's notebook does."""
    options = {"image_size": (SIZE, SIZE), "batch_size": BATCH_SIZE, "verbose": False}
    for _ in keras.utils.image_dataset_from_directory(folder, **options):
        pass


def read_like_workflow(folder: Path, state: Path, epochs: int) -> None:
    """Preprocess as preprocess_data() does, and read all splits for this many epochs."""
    splits = load_splits(folder, state, *SPLITS)
    for _ in range(epochs):
        for split in splits:
            for _ in split:
                pass


def measure_seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--pixels", type=int, default=4000, help="width and height of a photo")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "photos")
        write_photos(folder, arguments.photos, [arguments.pixels], originals=2)
        for number in range(arguments.rounds):
            once, repeated = Path(root, f"once-{number}"), Path(root, f"repeated-{number}")
            for name, step in (
                (PILLOW, [read_with_pillow, folder, True]),
                (OURS, [read_like_workflow, folder, once, 0]),
                (FULL, [read_with_pillow, folder, False]),
                (LAB, [read_like_lab, folder]),
                (EPOCHS.format(arguments.epochs), [read_like_workflow, folder, repeated, arguments.epochs]),
            ):
                figures.setdefault(name, []).append(measure_seconds(*step))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    table = {name: float(np.median(rows)) for name, rows in figures.items()}
    size = f"{arguments.pixels} x {arguments.pixels}"
    print(f"{arguments.photos} JPEGs of {size} pixels, median of {arguments.rounds}; {describe_machine()}")
    print(f"{'':30}{'seconds':>9}{'photos per second':>19}{'per core':>10}{'relative to Pillow':>20}")
    for name, seconds in table.items():
        rate = arguments.photos / seconds
        print(f"{name:30}{seconds:9.2f}{rate:19.1f}{rate / os.cpu_count():10.1f}{table[PILLOW] / seconds:20.2f}")
    ratio = arguments.epochs * table[LAB] / table[EPOCHS.format(arguments.epochs)]
    print(f"{arguments.epochs} epochs: {ratio:.1f} times as fast as the lab")


if __name__ == "__main__":
    main()
