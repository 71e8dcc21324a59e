"""Measure images per second of training the small network on a folder, and on the same images in memory.

    python benchmarks/training.py [--photos 20000] [--rounds 5]

Training keeps the pixels of all images in memory, too; a tf.data.Dataset shuffles them.
"""

import argparse
import tempfile
import time
from pathlib import Path

from lib.machine import describe_machine
from lib.photos import write_photos
from lib.small_network import load_splits

import ml_workflow
from workflow.model.head import compile_model
from workflow.model.small_network import build_small_network

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {"from memory": [], "as training reads": []}
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder, "photos"), arguments.photos, [300])
        (train,) = load_splits(Path(folder, "photos"), Path(folder), "train")
        pixels, labels = map(np.concatenate, zip(*train, strict=True))
        options = ml_workflow.SMALL_SIZE, ml_workflow.FILTERS, ml_workflow.DROPOUT, ml_workflow.SEED
        model = build_small_network(len(train.class_names), *options)
        compile_model(model, ml_workflow.LEARNING_RATE, 2 * arguments.rounds * len(train))
        model.fit(train.batches.take(10), shuffle=False, verbose=0)
        model.fit(pixels[:80], labels[:80], train.batch_size, verbose=0)
        for _ in range(arguments.rounds):
            for name, inputs in (
                ("from memory", {"x": pixels, "y": labels, "batch_size": train.batch_size}),
                ("as training reads", {"x": train.batches, "shuffle": False}),
            ):
                start = time.perf_counter()
                model.fit(**inputs, verbose=0)
                rates[name].append(len(labels) / (time.perf_counter() - start))
    from_memory = np.median(rates["from memory"])
    print(f"{len(labels)} training images, one epoch, median of {arguments.rounds}; {describe_machine()}")
    print(f"{'':20}{'images per second':>19}{'of memory':>11}")
    for name, values in rates.items():
        print(f"{name:20}{np.median(values):19.0f}{np.median(values) / from_memory:11.2f}")


if __name__ == "__main__":
    main()
