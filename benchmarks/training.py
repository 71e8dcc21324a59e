"""Photos per second of training the small network on a folder's images, beside the same network from memory.

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
from workflow.model import network

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[str, list[float]] = {"from memory": [], "as training reads": []}
    with tempfile.TemporaryDirectory() as place:
        write_photos(Path(place, "photos"), arguments.photos, [300])
        (train,) = load_splits(Path(place, "photos"), Path(place), "train")
        pixels, labels = map(np.concatenate, zip(*train, strict=True))
        options = ml_workflow.SMALL_SIZE, ml_workflow.FILTERS, ml_workflow.DROPOUT, ml_workflow.SEED
        model = network.build_small(len(train.class_names), *options)
        network.compile_model(model, ml_workflow.LEARNING_RATE, 2 * arguments.rounds * len(train))
        model.fit(train.batches.take(10), shuffle=False, verbose=0)
        model.fit(pixels[:80], labels[:80], train.batch_size, verbose=0)
        for _ in range(arguments.rounds):
            for name, inputs in (
                ("from memory", {"x": pixels, "y": labels, "batch_size": train.batch_size}),
                ("as training reads", {"x": train.batches, "shuffle": False}),
            ):
                start = time.perf_counter()
                model.fit(**inputs, verbose=0)
                figures[name].append(len(labels) / (time.perf_counter() - start))
    memory = np.median(figures["from memory"])
    print(f"{len(labels)} training images, one epoch, median of {arguments.rounds}; {describe_machine()}")
    print(f"{'':20}{'images per second':>19}{'of memory':>11}")
    for name, rates in figures.items():
        print(f"{name:20}{np.median(rates):19.0f}{np.median(rates) / memory:11.2f}")


if __name__ == "__main__":
    main()
