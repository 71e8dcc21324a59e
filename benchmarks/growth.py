"""Time and peak memory of each step as the folder grows.

    python benchmarks/growth.py [--sizes 20 200 2000 20000]

The photos are drawn, of 1000 pixels, every twentieth as large as a phone's (4000). The steps run in a process of
their own for each size, without Prefect.
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


def link_part(folder: Path, whole: Path, count: int) -> Path:
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
        write_photos(Path(place, "whole"), max(arguments.sizes))
        for size in arguments.sizes:
            folder = link_part(Path(place, str(size)), Path(place, "whole"), size)
            settings = choose_settings(Path(place, f"state-{size}"))
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
            print(f"{step:18}" + "".join(f"{each:10.2f} ({total:6.1f}) {memory:6.0f}" for each, total, memory in cells))


if __name__ == "__main__":
    main()
