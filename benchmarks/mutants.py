"""Damaged images by the million: reading one gives pixels or a ValueError with the reason, and nothing else.

    python benchmarks/mutants.py [--mutants 1000000] [--seed 1]

Whole images of each format that is allowed are changed at random, by seed. The baseline is reading the whole ones.
"""

import argparse
import io
import os
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from lib.machine import describe_machine
from lib.mutants import mutate

from workflow.image_classifier import FORMATS, read_image

import numpy as np
from PIL import Image

SIZE = 32  # pixels, both sides, to which an image is shrunk
AT_ONCE = 1000  # mutants of a task
Task = tuple[str, int, int]  # format, seed, mutants


def encode(kind: str, random: np.random.Generator) -> bytes:
    """A small picture as a file of a format."""
    coarse = Image.fromarray(random.integers(0, 256, (5, 4, 3), "uint8")).resize((40, 60))
    content = io.BytesIO()
    coarse.save(content, kind)
    return content.getvalue()


def read_mutants(task: Task) -> tuple[str, Counter[str], float, float]:
    """What came of a task's mutants, the slowest in seconds, and the seconds for as many whole images."""
    warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
    kind, seed, count = task
    random, ends, slowest = np.random.default_rng([seed, FORMATS.index(kind)]), Counter[str](), 0.0
    whole = encode(kind, random)
    start = time.perf_counter()
    for _ in range(20):
        read_image(whole, SIZE)
    baseline = (time.perf_counter() - start) / 20
    for number in range(count):
        body = mutate(whole, random)
        start = time.perf_counter()
        try:
            shape = read_image(body, SIZE).shape
            ends["read" if shape == (SIZE, SIZE, 3) else f"pixels of shape {shape}"] += 1
        except ValueError:
            ends["refused"] += 1
        except Exception as error:
            ends[f"{type(error).__name__} at seed {seed}, mutant {number}: {error}"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    return kind, ends, slowest, baseline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tasks = -(-arguments.mutants // len(FORMATS) // AT_ONCE)
    todo = [(kind, arguments.seed * 10**6 + number, AT_ONCE) for number in range(tasks) for kind in FORMATS]
    found = {kind: (Counter[str](), [0.0], [0.0]) for kind in FORMATS}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for kind, ends, slowest, baseline in pool.map(read_mutants, todo):
            found[kind][0].update(ends)
            found[kind][1].append(slowest)
            found[kind][2].append(baseline)
    print(f"{len(todo) * AT_ONCE:,} mutants, seed {arguments.seed}; {describe_machine()}")
    print(f"{'format':8}{'mutants':>10}{'read':>10}{'refused':>10}{'other':>7}{'slowest ms':>12}{'a whole one ms':>16}")
    others = []
    for kind, (ends, slowest, baseline) in found.items():
        odd = {end: count for end, count in ends.items() if end not in ("read", "refused")}
        others += odd
        line = f"{kind:8}{ends.total():10,}{ends['read']:10,}{ends['refused']:10,}{sum(odd.values()):7}"
        print(f"{line}{1000 * max(slowest):12.1f}{1000 * np.median(baseline[1:]):16.2f}")
    print(*others, sep="\n")
    sys.exit(bool(others))


if __name__ == "__main__":
    main()
