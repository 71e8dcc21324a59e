"""Time and peak memory of each step as the folder grows.

    python benchmarks/growth.py [--sizes 20 200 2000 20000]

The photos are drawn, of 1000 pixels, every twentieth as large as a phone's (4000). The steps run in a process of
their own for each size, without Prefect.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from measure import PROJECT, machine, run

sys.path.insert(0, str(PROJECT / "sample_images"))
import draw

import numpy as np

DRAWN = 20  # originals a class; more photos are copies that differ in a few bytes behind the image


def photos(folder: Path, count: int, sizes: list[int], drawn: int = DRAWN) -> None:
    """`count` files, half of them a class, that decode like photos and differ in content, of these sizes in turn."""
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


def part(folder: Path, whole: Path, count: int) -> Path:
    """A folder with the first `count` of the photos of another one, which take no more room."""
    for kind in ("apples", "oranges"):
        (folder / kind).mkdir(parents=True)
        for path in sorted((whole / kind).iterdir())[: count // 2]:
            os.link(path, folder / kind / path.name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 200, 2000, 20000])
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as place:
        photos(Path(place, "whole"), max(arguments.sizes), [1000] * 19 + [4000])
        for size in arguments.sizes:
            folder, home = part(Path(place, str(size)), Path(place, "whole"), size), Path(place, f"home-{size}")
            home.mkdir()
            text = run(["benchmarks/steps.py", folder, home, arguments.epochs])[2]
            figures[size] = json.loads(text.splitlines()[-1])
            print(f"{size} done", file=sys.stderr)
        print(f"ms an image (seconds), peak MB; {arguments.epochs} epochs; {machine()}")
        print(f"{'photos':18}" + "".join(f"{size:>26,}" for size in figures))
        for step in next(iter(figures.values())):
            cells = (
                (1000 * seconds / size, seconds, memory)
                for size in figures
                for seconds, memory in [figures[size][step]]
            )
            print(f"{step:18}" + "".join(f"{each:10.2f} ({total:6.1f}) {memory:6.0f}" for each, total, memory in cells))


if __name__ == "__main__":
    main()
