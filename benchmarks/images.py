"""Preprocessing beside plain Pillow, ten epochs beside the notebook's way of reading, training beside memory.

    python benchmarks/images.py [--count N] [--rounds N]

On drawn photos as large as a phone's, 4000 pixels; each figure and its baseline in turn.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import PROJECT, machine, run

sys.path[:0] = [str(PROJECT)]
import tracking  # noqa: F401
import image_folder
import ml_workflow

import numpy as np
from growth import photos
from PIL import Image

SIZE = ml_workflow.IMAGE_SIZE


def plain(folder: Path) -> None:
    """Pillow alone: every file decoded at reduced scale and shrunk, on all cores; nothing checked, nothing kept."""

    def shrink(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            image.draft("RGB", (2 * SIZE, 2 * SIZE))
            return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=2.0))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(shrink, folder.glob("*/*")))


def seconds(step, *arguments) -> float:
    start = time.perf_counter()
    step(*arguments)
    return time.perf_counter() - start


def preprocess(folder: Path, place: Path, rounds: int) -> None:
    count = len(list(folder.glob("*/*")))
    rows = [
        (seconds(plain, folder), seconds(image_folder.prepare_images, folder, place / str(number), SIZE))
        for number in range(rounds)
    ]
    for name, one in zip(("plain Pillow, all cores", "preprocess"), np.median(rows, axis=0), strict=True):
        print(f"{name:34}{count / one:9.1f} images/s{count / one / os.cpu_count():9.1f} a core")
    print(f"{'rate, of plain Pillow':34}{np.median([first / second for first, second in rows]):9.2f}")


def reading(folder: Path, place: Path) -> None:
    """Once each: the notebook's way decodes every photo in every epoch."""
    notebook = run(["benchmarks/notebook.py", folder, 10])
    (place / "steps").mkdir(parents=True)
    ours = run(["benchmarks/steps.py", folder, place / "steps", 10])
    for name, taken in (("ten epochs, notebook", notebook[0]), ("ten epochs, ours, all steps", ours[0])):
        print(f"{name:34}{taken:9.1f} s")
    print(f"{'times faster':34}{notebook[0] / ours[0]:9.1f}")


def training(folder: Path, place: Path, rounds: int) -> None:
    """Epochs of training from the files that preprocessing left, as with many images, and from memory."""
    import tensorflow as tf

    image_folder.CACHE = 0

    digest, prepared, images = image_folder.prepare_images(folder, place / "0", SIZE)
    data = {"digest": digest, "images": [image | {"split": "train"} for image in images if not image["reason"]]}
    streamed = image_folder.load_split("train", prepared, data, SIZE, ml_workflow.BATCH_SIZE, 1)
    pixels, labels = (np.concatenate(parts) for parts in zip(*streamed.as_numpy_iterator(), strict=True))
    memory = tf.data.Dataset.from_tensor_slices((pixels, labels)).shuffle(len(labels))
    memory = memory.batch(ml_workflow.BATCH_SIZE).prefetch(tf.data.AUTOTUNE)
    model = ml_workflow.build_model(2)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(memory, verbose=0)  # traced
    fit = {name: lambda data=data: model.fit(data, verbose=0) for name, data in (("m", memory), ("s", streamed))}
    rows = [(seconds(fit["m"]), seconds(fit["s"])) for _ in range(rounds)]
    for name, one in zip(("training from memory", "training from files"), np.median(rows, axis=0), strict=True):
        print(f"{name:34}{len(labels) / one:9.0f} images/s")
    print(f"{'rate, of memory':34}{np.median([first / second for first, second in rows]):9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="photos for preprocessing and reading")
    parser.add_argument("--train", type=int, default=2000, help="smaller photos for training")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        large, small = Path(place, "large"), Path(place, "small")
        photos(large, arguments.count, [4000])
        photos(small, arguments.train, [500])
        print(f"{arguments.count} photos of 4000 pixels, median of {arguments.rounds}; {machine()}")
        reading(large, Path(place, "large-out"))
        preprocess(large, Path(place, "large-out"), arguments.rounds)
        training(small, Path(place, "small-out"), arguments.rounds)


if __name__ == "__main__":
    main()
