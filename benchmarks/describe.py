"""Photos per second of features on one and on two Dask workers of one core each, and in one process with all cores.

    python benchmarks/describe.py [--photos 2000] [--rounds 3] [--kill]

The photos are drawn, of 1000 pixels, every twentieth as large as a phone's (4000). The workers are processes of their
own, started in another folder. With --kill one of two workers is killed in the middle instead, and the features are
compared with those of an undisturbed process.
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

from growth import photos
from measure import PROJECT, SECONDS, machine

sys.path.insert(0, str(PROJECT))
from workflow.images import image_folder
from workflow.model import features
from workflow.running import tracking  # noqa: F401  (it has settings that TensorFlow and Dask read when they are imported)

import distributed
import numpy as np
from distributed.diagnostics.plugin import SchedulerPlugin

ONE_CORE = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
WARM = 2 * features.AT_ONCE * features.CHUNK  # photos: at least one chunk for each of two workers
ONE, TWO, ALONE = "one worker", "two workers", "one process, all cores"


class Assignments(SchedulerPlugin):
    """How many times the scheduler has given each chunk to a worker."""

    def __init__(self):
        self.times = Counter()

    def transition(self, key, start, finish, *_, **__) -> None:
        self.times[key] += finish == "processing"


@contextlib.contextmanager
def worker(cluster: distributed.LocalCluster, folder: Path, name: str) -> Iterator[subprocess.Popen]:
    """A Dask worker of one core, until the block ends."""
    options = ["--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    command = [sys.executable, "-m", "dask", "worker", cluster.scheduler_address, *options]
    with open(folder / "worker.log", "a") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | ONE_CORE, stdout=log, stderr=log)
        try:
            wait_for(cluster, name, True)
            yield process
        finally:
            process.terminate()
            process.wait()
            wait_for(cluster, name, False)


def wait_for(cluster: distributed.LocalCluster, name: str, there: bool) -> None:
    """Returns when the scheduler knows a worker of that name, or knows it no more."""
    deadline = time.monotonic() + SECONDS
    while (name in [worker.name for worker in list(cluster.scheduler.workers.values())]) != there:
        if time.monotonic() > deadline:
            sys.exit(f"the worker {name} did not {'come' if there else 'go'}")
        time.sleep(0.05)


class Folder:
    """A folder of drawn photos whose features are computed anew each time."""

    def __init__(self, place: Path, count: int):
        self.place, self.folder, self.number = place, place / "photos", itertools.count()
        photos(self.folder, count, [1000] * 19 + [4000])
        _, self.images = image_folder.digest_files(self.folder, place)

    def describe(
        self, dask: str | None, progress=lambda done, total: None
    ) -> tuple[float, dict[str, features.Described]]:
        """The seconds that the features take after some others have been computed, and the features."""
        for images in (self.images[:WARM], self.images):
            into, start = self.place / f"features-{next(self.number)}", time.perf_counter()
            told = progress if images is self.images else lambda done, total: None
            _, found = features.load_features(images, self.folder, into, dask, told)
        return time.perf_counter() - start, found


def measure_rates(photos: Folder, cluster: distributed.LocalCluster, rounds: int) -> None:
    """Prints a table of the rates, which are measured in turn."""
    address, rates = cluster.scheduler_address, {ONE: [], TWO: [], ALONE: []}
    for number in range(rounds):
        with worker(cluster, photos.place, "first"):
            rates[ONE].append(len(photos.images) / photos.describe(address)[0])
            with worker(cluster, photos.place, "second"):
                rates[TWO].append(len(photos.images) / photos.describe(address)[0])
        rates[ALONE].append(len(photos.images) / photos.describe(None)[0])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    print(f"{len(photos.images)} photos, median of {rounds}; {machine()}")
    print(f"{'':24}{'photos per second':>18}{'of one worker':>15}")
    for name, found in rates.items():
        print(f"{name:24}{np.median(found):18.1f}{np.median(np.divide(found, rates[ONE])):15.2f}")


def kill_one(photos: Folder, cluster: distributed.LocalCluster) -> None:
    """Kills one of two workers in the middle, and compares the features with those of an undisturbed process."""
    killed, expected = [], photos.describe(None)[1]
    cluster.scheduler.add_plugin(assignments := Assignments())
    with worker(cluster, photos.place, "first") as first, worker(cluster, photos.place, "second"):

        def kill(done: int, total: int) -> None:
            if done > total / 2 and not killed:
                killed.append(done)
                os.kill(first.pid, signal.SIGKILL)

        seconds, found = photos.describe(cluster.scheduler_address, kill)
    missing = len(expected.keys() - found.keys())
    again = sum(times > 1 for times in assignments.times.values())
    difference = max(np.abs(expected[digest].features - found[digest].features).max() for digest in found)
    print(f"one of two workers killed after {killed[0]} of {len(photos.images)} photos, done after {seconds:.1f} s")
    print(f"{missing} photos without features; {again} chunks of {features.CHUNK} were given to the other worker again")
    print(f"largest difference from the features of an undisturbed process: {difference:.1e}")
    if missing:
        sys.exit("the features are not complete")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true", help="kill one of two workers instead of measuring")
    arguments = parser.parse_args()
    options = {"n_workers": 0, "protocol": "tcp", "dashboard_address": "127.0.0.1:0"}
    with tempfile.TemporaryDirectory() as place, distributed.LocalCluster(**options) as cluster:
        folder = Folder(Path(place), arguments.photos)
        if arguments.kill:
            kill_one(folder, cluster)
        else:
            measure_rates(folder, cluster, arguments.rounds)


if __name__ == "__main__":
    main()
