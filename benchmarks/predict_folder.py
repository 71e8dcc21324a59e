"""Compare predict.py on a folder with one process per image, and measure its memory as the folder grows.

    python ml_workflow.py; python benchmarks/predict_folder.py

The first command registers the champion that predict.py uses.
"""

import argparse
import tempfile
from pathlib import Path

from lib.machine import describe_machine
from lib.photos import draw_image
from lib.processes import run_python

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
        originals = [draw_image(number, arguments.pixels) for number in range(10)]
        for number in range(max(sizes)):
            for size in sizes:
                if number < size:
                    originals[number % 10].save(Path(folder, str(size), f"{number:04}.jpeg"))
        commands = {size: ["predict.py", Path(folder, str(size))] for size in sizes}
        rounds = [{size: run_python(commands[size])[:2] for size in sizes} for _ in range(arguments.rounds)]
    seconds_per_process = np.median([times[1][0] for times in rounds])
    pixels = f"{arguments.pixels} x {arguments.pixels} pixels"
    print(f"JPEGs of {pixels}, median of {arguments.rounds}; {describe_machine()}")
    print(f"{'images':>8}{'seconds':>10}{'ms per image':>14}{'peak MB':>10}{'faster than one process per image':>36}")
    for size in sizes:
        seconds, memory = np.median([times[size] for times in rounds], axis=0)
        speedup = seconds_per_process * size / seconds
        print(f"{size:8}{seconds:10.2f}{1000 * seconds / size:14.1f}{memory:10.0f}{speedup:35.1f}x")


if __name__ == "__main__":
    main()
