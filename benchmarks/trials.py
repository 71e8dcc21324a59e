"""Compare trials per minute with one and with two local workers, alternating.

    python benchmarks/trials.py [--rounds 3] [--trials 12]

A trial trains heads on the features of 18 images, without Prefect or MLflow.
"""

import argparse
import time
from statistics import median

from lib.machine import describe_machine

import tune
from workflow.model import backbone

import distributed
import numpy as np

FOLDS, IMAGES, SEED = 5, 18, 1


def count_trials_per_minute(workers: int, trials: int) -> float:
    features = np.random.default_rng(1).random((IMAGES, backbone.FEATURES), "float32")
    groups = [str(number) for number in range(IMAGES)]  # no near-duplicates
    images = features, np.arange(IMAGES) % 2, groups
    options = {"threads_per_worker": 1, "memory_limit": None, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(n_workers=workers, **options) as cluster, distributed.Client(cluster) as client:

        def run(numbers: range, **where) -> None:
            fn = tune.try_parameters.fn
            arguments = tune.DEFAULTS, images, FOLDS, SEED
            client.gather([client.submit(fn, number, *arguments, pure=False, **where) for number in numbers])

        for worker in client.scheduler_info(n_workers=-1)["workers"]:
            run(range(1), workers=[worker])  # imports TensorFlow
        start = time.perf_counter()
        run(range(trials))
        return 60 * trials / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12, help="per round")
    arguments = parser.parse_args()
    rates = {1: [], 2: []}
    for _ in range(arguments.rounds):
        for workers in rates:
            rates[workers].append(count_trials_per_minute(workers, arguments.trials))
            print(f"{workers} worker(s): {rates[workers][-1]:.1f} trials per minute", flush=True)
    ratios = [double / single for single, double in zip(*rates.values(), strict=True)]
    print(describe_machine())
    spread = f"median of {arguments.rounds}: {min(ratios):.2f} to {max(ratios):.2f}"
    print(f"2 workers / 1 worker: {median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
