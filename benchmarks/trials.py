"""Trials a minute with one and with two local workers, alternating: what the second worker brings.

    python benchmarks/trials.py

Without Prefect and MLflow, which cost seconds in a search of minutes.
"""

import sys
import time
from statistics import median

from measure import PROJECT, machine

sys.path.insert(0, str(PROJECT))
import tune

import distributed
import numpy as np

ROUNDS, TRIALS, FOLDS = 3, 4, 2
PARAMETERS = tune.DEFAULTS | {"epochs": 30}


def trials_a_minute(workers: int) -> float:
    pixels = np.random.default_rng(1).integers(0, 256, (18, 64, 64, 3), "uint8")
    task = pixels, np.arange(18) % 2, FOLDS, 1, [np.inf] * FOLDS
    options = {"threads_per_worker": 1, "memory_limit": None, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(n_workers=workers, **options) as cluster, distributed.Client(cluster) as client:

        def run(numbers: range, **where) -> None:
            fn = tune.try_parameters.fn
            client.gather([client.submit(fn, n, PARAMETERS, *task, pure=False, **where) for n in numbers])

        for worker in client.scheduler_info(n_workers=-1)["workers"]:
            run(range(1), workers=[worker])  # imports TensorFlow
        start = time.perf_counter()
        run(range(TRIALS))
        return 60 * TRIALS / (time.perf_counter() - start)


if __name__ == "__main__":
    rates = {1: [], 2: []}
    for _ in range(ROUNDS):
        for workers in rates:
            rates[workers].append(trials_a_minute(workers))
            print(f"{workers} worker(s): {rates[workers][-1]:.1f} trials a minute", flush=True)
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    print(machine())
    print(f"2 workers / 1 worker: {median(ratios):.2f} (median of {ROUNDS}: {min(ratios):.2f} to {max(ratios):.2f})")
