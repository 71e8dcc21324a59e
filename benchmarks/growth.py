"""Measure time and peak memory of each pipeline step as the data set grows.

    python benchmarks/growth.py [--sizes 20 200 2000 20000]

The synthetic photos are 1000 pixels wide; every twentieth is 4000 pixels wide, like a phone's. For each size, the steps
run in a separate process without Prefect.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from lib.machine import describe_machine
from lib.photos import write_photos
from lib.processes import choose_settings, run_python


def link_photos(folder: Path, source: Path, count: int) -> Path:
    """Fill a folder with hard links to `count` photos of another folder, and return it."""
    for kind in ("apples", "oranges"):
        (folder / kind).mkdir(parents=True)
        for path in sorted((source / kind).iterdir())[: count // 2]:
            os.link(path, folder / kind / path.name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 200, 2000, 20000])
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as root:
        write_photos(Path(root, "whole"), max(arguments.sizes))
        for size in arguments.sizes:
            folder = link_photos(Path(root, str(size)), Path(root, "whole"), size)
            settings = choose_settings(Path(root, f"state-{size}"))
            text = run_python(["benchmarks/steps.py", folder, arguments.epochs], **settings)[2]
            figures[size] = json.loads(text.splitlines()[-1])
            print(f"{size} done", file=sys.stderr)
        print(f"ms per image (seconds), peak MB; {arguments.epochs} epochs; {describe_machine()}")
        print(f"{'photos':18}" + "".join(f"{size:>26,}" for size in figures))
        for step in next(iter(figures.values())):
            cells = (
                (1000 * seconds / size, seconds, memory)
                for size in figures
                for seconds, memory in [figures[size][step]]
            )
            print(f"{step:18}" + "".join(f"{ms:10.2f} ({seconds:6.1f}) {memory:6.0f}" for ms, seconds, memory in cells))


if __name__ == "__main__":
    main()
