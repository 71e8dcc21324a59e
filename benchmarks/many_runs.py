"""Measure whether many runs in a row get slower or leak, and how much disk space `mlflow gc` frees afterwards.

    python benchmarks/many_runs.py [--runs 100]

Each run trains for two epochs on the sample images, with both servers running. Memory and open files of the servers are
summed over their processes. At the end, all registered versions except the champion and the newest ten are deleted in
MLflow, with their runs and logged models, and `mlflow gc` removes them from the disk.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median

from lib.machine import describe_machine
from lib.processes import MODEL, run_python, start_both_servers

import mlflow
import psutil

FLOW = ["ml_workflow.py", "--source", "sample_images", "--epochs", "2", "--seed"]
COLLECT_GARBAGE = "mlflow gc --backend-store-uri sqlite:///mlflow.db --tracking-uri sqlite:///mlflow.db"
PLACES = ("dataset", "models", "mlartifacts", "mlflow.db", "prefect_home")
MAX_VERSIONS = 10  # kept in the registry, besides the champion


def measure_servers() -> tuple[float, int]:
    """Return the memory in MB and the number of open files of all child processes."""
    processes = psutil.Process().children(recursive=True)
    megabytes = sum(process.memory_info().rss for process in processes) / 1e6
    return megabytes, sum(process.num_fds() for process in processes)


def measure_disk(state: Path) -> list[float]:
    """Return the disk use of each of PLACES in MB; a file with several hard links counts once."""
    inodes, sizes = set(), []
    for place in PLACES:
        stats = [path.stat() for path in [state / place, *state.glob(f"{place}/**/*")] if path.is_file()]
        new = {status.st_ino: status.st_size for status in stats if status.st_ino not in inodes}
        inodes |= new.keys()
        sizes.append(sum(new.values()) / 1e6)
    return sizes


def delete_old_versions(state: Path) -> int:
    """Delete all versions except the champion and the newest ones, with their runs and models; return their number."""
    client, name = mlflow.MlflowClient(f"sqlite:///{state / 'mlflow.db'}"), MODEL[8:].partition("@")[0]
    champion = client.get_model_version_by_alias(name, "champion").version
    versions = client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
    old = [version for version in versions[MAX_VERSIONS:] if version.version != champion]
    for version in old:
        models = client.get_run(version.run_id).outputs.model_outputs
        client.delete_model_version(name, version.version)
        for model in models:
            client.delete_logged_model(model.model_id)
        client.delete_run(version.run_id)
    return len(old)


def collect_garbage(state: Path, settings: dict) -> float:
    """Run `mlflow gc` in the state folder, and return how many seconds it takes."""
    return run_python(["-m", *shlex.split(COLLECT_GARBAGE)], folder=state, **settings)[0]


def measure_runs(count: int, state: Path, settings: dict) -> tuple[list, list]:
    """Return the time and peak memory of each run, and rows of server and disk measurements."""
    figures, rows = [], []
    for number in range(1, count + 1):
        seconds, megabytes, _ = run_python([*FLOW, str(number)], **settings)
        figures.append((seconds, megabytes))
        if number in (1, 10, count // 2, count):
            rows.append((number, *measure_servers(), *measure_disk(state)))
            print(f"{number} of {count} runs", file=sys.stderr)
    return figures, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder, start_both_servers(Path(folder, "state")) as settings:
        state = Path(folder, "state")
        figures, rows = measure_runs(count, state, settings)
        deleted = delete_old_versions(state)
        gc_seconds = collect_garbage(state, settings)
        rows.append(("gc", *measure_servers(), *measure_disk(state)))
    print(f"{count} runs; {describe_machine()}")
    sample = min(10, count)
    for title, part in ((f"first {sample}", figures[:sample]), (f"last {sample}", figures[-sample:])):
        seconds, megabytes = (median(column) for column in zip(*part, strict=True))
        print(f"{title:8} {seconds:6.1f} s, peak {megabytes:5.0f} MB (medians)")
    print(f"{'after':>8}{'servers MB':>12}{'open files':>12}" + "".join(f"{name:>14}" for name in PLACES) + "  (MB)")
    for label, megabytes, files, *sizes in rows:
        print(f"{label:>8}{megabytes:12.0f}{files:12}" + "".join(f"{size:14.1f}" for size in sizes))
    print(f"{COLLECT_GARBAGE} took {gc_seconds:.1f} s for {deleted} deleted versions")


if __name__ == "__main__":
    main()
