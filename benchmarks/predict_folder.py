"""predict.py on one folder, beside one process an image, and its peak memory as the folder grows.

python ml_workflow.py; python benchmarks/predict_folder.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "sample_images"))
import draw

import numpy as np


def run(*arguments: str) -> tuple[float, float]:
    """The seconds and the peak memory, in MB, of one predict.py."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, PROJECT / "predict.py", *arguments], stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            output.seek(0)
            sys.exit(output.read().decode())
    return time.perf_counter() - start, usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


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
        rounds = [{size: run(str(Path(folder, str(size)))) for size in sizes} for _ in range(arguments.rounds)]
    alone = np.median([one[1][0] for one in rounds])
    print(
        f"JPEGs of {arguments.pixels} x {arguments.pixels} pixels, median of {arguments.rounds}, {os.cpu_count()} cores"
    )
    print(f"{'images':>8}{'seconds':>10}{'ms an image':>14}{'peak MB':>10}{'faster than one process an image':>36}")
    for size in sizes:
        seconds, memory = np.median([one[size] for one in rounds], axis=0)
        print(f"{size:8}{seconds:10.2f}{1000 * seconds / size:14.1f}{memory:10.0f}{alone * size / seconds:35.1f}x")


if __name__ == "__main__":
    main()
