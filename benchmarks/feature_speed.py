"""Compare the speed of feature computation on one and two Dask workers, with one core each, and in one process.

    python benchmarks/feature_speed.py [--photos 2000] [--rounds 3] [--kill]

The photos are synthetic and 1000 pixels wide; every twentieth is 4000 pixels wide, like a phone's. Scheduler and
workers are separate processes, and the workers start in another folder. With --kill, kill one of two workers halfway
instead, and compare the features with those of one process.
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lib.machine import describe_machine
from lib.photos import write_photos
from lib.processes import TIMEOUT_SECONDS

from workflow.data import features
from workflow.data.folder import digest_files
from workflow.orchestration import cluster

import distributed
import numpy as np
from distributed.diagnostics.plugin import SchedulerPlugin

ONE_CORE = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
WARMUP_PHOTOS = 2 * cluster.TASKS_PER_THREAD * features.MAX_CHUNK_IMAGES  # at least a chunk for each of two workers
ONE, TWO, ALONE = "one worker", "two workers", "one process, all cores"


class Assignments(SchedulerPlugin):
    """Count how often the scheduler assigns each chunk to a worker."""

    def __init__(self):
        self.times = Counter()

    def transition(self, key, start, finish, *_, **__) -> None:
        self.times[key] += finish == "processing"


@contextlib.contextmanager
def start_worker(client: distributed.Client, folder: Path, name: str) -> Iterator[subprocess.Popen]:
    """Run a Dask worker with one core until the block ends."""
    options = ["--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    command = [sys.executable, "-m", "dask", "worker", client.scheduler.address, *options]
    with open(folder / "worker.log", "a") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | ONE_CORE, stdout=log, stderr=log)
        try:
            wait_for_worker(client, name, True)
            yield process
        finally:
            process.terminate()
            process.wait()
            wait_for_worker(client, name, False)


def wait_for_worker(client: distributed.Client, name: str, is_running: bool) -> None:
    """Wait until the scheduler lists the worker, or no longer lists it."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while (
        name in [worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    ) != is_running:
        if time.monotonic() > deadline:
            sys.exit(f"the worker {name} did not {'start' if is_running else 'stop'}")
        time.sleep(0.05)


class Folder:
    """A folder of synthetic photos whose features are computed without a cache."""

    def __init__(self, root: Path, count: int):
        self.root, self.folder, self.number = root, root / "photos", itertools.count()
        write_photos(self.folder, count)
        self.images = digest_files(self.folder, root)

    def compute(
        self, dask: str | None, progress=lambda done, total: None
    ) -> tuple[float, dict[str, features.FeatureRow]]:
        """Return how many seconds the features took after a warm-up, and the features."""
        for images in (self.images[:WARMUP_PHOTOS], self.images):
            cache, start = self.root / f"features-{next(self.number)}", time.perf_counter()
            callback = progress if images is self.images else lambda done, total: None
            _, table = features.load_features(images, self.folder, cache, cluster.workers(dask), callback)
        return time.perf_counter() - start, table


def measure_rates(photos: Folder, client: distributed.Client, rounds: int) -> None:
    """Measure the rates alternately, and print a table."""
    address, rates = client.scheduler.address, {ONE: [], TWO: [], ALONE: []}
    for number in range(rounds):
        with start_worker(client, photos.root, "first"):
            rates[ONE].append(len(photos.images) / photos.compute(address)[0])
            with start_worker(client, photos.root, "second"):
                rates[TWO].append(len(photos.images) / photos.compute(address)[0])
        rates[ALONE].append(len(photos.images) / photos.compute(None)[0])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    print(f"{len(photos.images)} photos, median of {rounds}; {describe_machine()}")
    print(f"{'':24}{'photos per second':>18}{'of one worker':>15}")
    for name, values in rates.items():
        print(f"{name:24}{np.median(values):18.1f}{np.median(np.divide(values, rates[ONE])):15.2f}")


def kill_worker(photos: Folder, client: distributed.Client) -> None:
    """Kill one of two workers halfway, and compare the features with those of one process."""
    killed, expected = [], photos.compute(None)[1]
    client.register_plugin(Assignments(), "assignments")
    with start_worker(client, photos.root, "first") as first, start_worker(client, photos.root, "second"):

        def kill(done: int, total: int) -> None:
            if done > total / 2 and not killed:
                killed.append(done)
                os.kill(first.pid, signal.SIGKILL)

        seconds, table = photos.compute(client.scheduler.address, kill)
    missing = len(expected.keys() - table.keys())
    times = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["assignments"].times)
    repeated = sum(count > 1 for count in times.values())
    difference = max(np.abs(expected[digest].features - row.features).max() for digest, row in table.items())
    print(f"one of two workers killed after {killed[0]} of {len(photos.images)} photos, done after {seconds:.1f} s")
    size = features.MAX_CHUNK_IMAGES
    print(f"{missing} photos without features; {repeated} chunks of {size} were repeated by the other worker")
    print(f"largest difference from the features of one process: {difference:.1e}")
    if missing:
        sys.exit("features are missing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true", help="kill one of two workers instead of measuring")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as root,
        distributed.SubprocessCluster(n_workers=0, dashboard_address=None) as processes,
        distributed.Client(processes, set_as_default=False) as client,
    ):
        folder = Folder(Path(root), arguments.photos)
        if arguments.kill:
            kill_worker(folder, client)
        else:
            measure_rates(folder, client, arguments.rounds)


if __name__ == "__main__":
    main()
