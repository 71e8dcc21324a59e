"""Check that reading a damaged image either returns pixels or raises ValueError, on a million images.

    python benchmarks/mutants.py [--mutants 1000000] [--seed 1]

Valid images of each supported format are changed at random; the seed determines how. The baseline is the time to read
valid images.
"""

import argparse
import io
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from lib.machine import describe_machine
from lib.mutants import mutate

from workflow.image_classifier import FORMATS as READ_FORMATS
from workflow.image_classifier import read_image

import numpy as np
from PIL import Image

FORMATS = [kind for kind in READ_FORMATS if kind != "HEIF"]  # which Pillow cannot write
SIZE = 32  # pixels, both sides
TASK_SIZE = 1000  # mutants
Task = tuple[str, int, int]  # format, seed, mutants


def encode(kind: str, random: np.random.Generator) -> bytes:
    """Return a small image file of a format."""
    coarse = Image.fromarray(random.integers(0, 256, (5, 4, 3), "uint8")).resize((40, 60))
    content = io.BytesIO()
    coarse.save(content, kind)
    return content.getvalue()


def read_mutants(task: Task) -> tuple[str, Counter[str], float, float]:
    """Read the mutants of a task; return its format, the outcomes, the slowest and the baseline time per image."""
    kind, seed, count = task
    random, outcomes, slowest = np.random.default_rng([seed, FORMATS.index(kind)]), Counter[str](), 0.0
    valid = encode(kind, random)
    start = time.perf_counter()
    for _ in range(20):
        read_image(valid, SIZE)
    baseline = (time.perf_counter() - start) / 20
    for number in range(count):
        body = mutate(valid, random)
        start = time.perf_counter()
        try:
            shape = read_image(body, SIZE).shape
            outcomes["read" if shape == (SIZE, SIZE, 3) else f"pixels of shape {shape}"] += 1
        except ValueError:
            outcomes["refused"] += 1
        except Exception as error:
            outcomes[f"{type(error).__name__} at seed {seed}, mutant {number}: {error}"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    return kind, outcomes, slowest, baseline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tasks = -(-arguments.mutants // len(FORMATS) // TASK_SIZE)
    all_tasks = [(kind, arguments.seed * 10**6 + number, TASK_SIZE) for number in range(tasks) for kind in FORMATS]
    results = {kind: (Counter[str](), [0.0], [0.0]) for kind in FORMATS}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for kind, outcomes, slowest, baseline in pool.map(read_mutants, all_tasks):
            results[kind][0].update(outcomes)
            results[kind][1].append(slowest)
            results[kind][2].append(baseline)
    print(f"{len(all_tasks) * TASK_SIZE:,} mutants, seed {arguments.seed}; {describe_machine()}")
    print(f"{'format':8}{'mutants':>10}{'read':>10}{'refused':>10}{'other':>7}{'slowest ms':>12}{'valid image ms':>16}")
    failures = []
    for kind, (outcomes, slowest, baseline) in results.items():
        unexpected = {name: n for name, n in outcomes.items() if name not in ("read", "refused")}
        failures += unexpected
        line = (
            f"{kind:8}{outcomes.total():10,}{outcomes['read']:10,}{outcomes['refused']:10,}{sum(unexpected.values()):7}"
        )
        print(f"{line}{1000 * max(slowest):12.1f}{1000 * np.median(baseline[1:]):16.2f}")
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
