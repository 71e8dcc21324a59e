"""predict.py on one folder, beside one process an image, and its peak memory as the folder grows.

python ml_workflow.py; python benchmarks/predict_folder.py
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import PROJECT, machine, run

sys.path.insert(0, str(PROJECT / "sample_images"))
import draw

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, default=1500, help="width and height of an image")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = (1, 100, 1000)
        for size in sizes:
            Path(folder, str(size)).mkdir()
        originals = [
            draw.draw(("apples", "oranges")[number % 2], arguments.pixels, np.random.default_rng(number))
            for number in range(10)
        ]
        for number in range(max(sizes)):
            for size in sizes:
                if number < size:
                    originals[number % 10].save(Path(folder, str(size), f"{number:04}.jpeg"))
        rounds = [
            {size: run(["predict.py", Path(folder, str(size))])[:2] for size in sizes} for _ in range(arguments.rounds)
        ]
    alone = np.median([one[1][0] for one in rounds])
    print(f"JPEGs of {arguments.pixels} x {arguments.pixels} pixels, median of {arguments.rounds}; {machine()}")
    print(f"{'images':>8}{'seconds':>10}{'ms an image':>14}{'peak MB':>10}{'faster than one process an image':>36}")
    for size in sizes:
        seconds, memory = np.median([one[size] for one in rounds], axis=0)
        print(f"{size:8}{seconds:10.2f}{1000 * seconds / size:14.1f}{memory:10.0f}{alone * size / seconds:35.1f}x")


if __name__ == "__main__":
    main()
