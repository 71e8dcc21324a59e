"""Real runs in a row: does anything get slower, larger or stay open, and what does `--clean` give back?

    python benchmarks/many_runs.py [--runs 100]

Each run trains two epochs on the sample images, with both servers up. The servers' memory and open files are summed up
over their processes. At the end all registered versions but the newest ten are deleted in MLflow, and `--clean` is run.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from lib.machine import describe_machine
from lib.processes import MODEL, run_python, start_both_servers

from workflow.orchestration.cleaning import disk_use

import mlflow
import psutil

FLOW = ["ml_workflow.py", "--source", "sample_images", "--epochs", "2", "--seed"]
FOLDERS = ("dataset", "models", "mlartifacts", "mlflow.db", "prefect_home")
KEPT = 10  # registered versions, at the end


def measure_servers() -> tuple[float, int]:
    """Megabytes and open files of the processes that this one has started, and of theirs."""
    processes = psutil.Process().children(recursive=True)
    megabytes = sum(process.memory_info().rss for process in processes) / 1e6
    return megabytes, sum(process.num_fds() for process in processes)


def measure_disk(state: Path) -> list[float]:
    """Megabytes of each of FOLDERS; a file with two names counts where it is met first."""
    before, sizes = 0, []
    for number in range(1, len(FOLDERS) + 1):
        places = [state / name for name in FOLDERS[:number]]
        files = [path for path in places if path.is_file()]
        now = disk_use([path for path in places if path.is_dir()]) + sum(path.stat().st_size for path in files)
        sizes.append((now - before) / 1e6)
        before = now
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    count, rows, figures = parser.parse_args().runs, [], []
    with tempfile.TemporaryDirectory() as place, start_both_servers(Path(place, "state")) as settings:
        state = Path(place, "state")
        for number in range(1, count + 1):
            seconds, megabytes, _ = run_python([*FLOW, str(number)], **settings)
            figures.append((seconds, megabytes))
            if number in (1, 10, count // 2, count):
                rows.append((number, *measure_servers(), *measure_disk(state)))
                print(f"{number} of {count} runs", file=sys.stderr)
        client, name = mlflow.MlflowClient(f"sqlite:///{state / 'mlflow.db'}"), MODEL[8:].partition("@")[0]
        champion = client.get_model_version_by_alias(name, "champion").version
        for version in client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])[KEPT:]:
            if version.version != champion:
                client.delete_model_version(name, version.version)
        cleaning, _, told = run_python(["ml_workflow.py", "--clean"], **settings)
        rows.append(("cleaned", *measure_servers(), *measure_disk(state)))
    few = min(10, count)
    print(f"{count} runs; {describe_machine()}")
    for title, part in ((f"first {few}", figures[:few]), (f"last {few}", figures[-few:])):
        seconds, megabytes = (median(column) for column in zip(*part, strict=True))
        print(f"{title:8} {seconds:6.1f} s, peak {megabytes:5.0f} MB (medians)")
    print(f"{'after':>8}{'servers MB':>12}{'open files':>12}" + "".join(f"{name:>14}" for name in FOLDERS) + "  (MB)")
    for number, megabytes, files, *sizes in rows:
        print(f"{number:>8}{megabytes:12.0f}{files:12}" + "".join(f"{size:14.1f}" for size in sizes))
    print(f"--clean took {cleaning:.1f} s: {told.strip().splitlines()[-2]}")


if __name__ == "__main__":
    main()
