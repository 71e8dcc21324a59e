"""Compare a whole run of ml_workflow.py with the lab's notebook and with a bare Keras script of the same model.

    python benchmarks/whole_run.py [--source FOLDER] [--rounds N]

All train in turn on the same 20 photos; without --source, these are synthetic. Runs of ml_workflow.py keep
their state in temporary folders, and use either the servers started here or none.
"""

import argparse
import itertools
import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from lib.machine import describe_machine
from lib.photos import write_photos
from lib.processes import choose_settings, run_python, start_both_servers

import ml_workflow

import numpy as np

NOTEBOOK, BARE = "the lab's notebook as a script", "the same model as a bare script"
PARAMETERS = ("epochs", "batch_size", "learning_rate", "dropout", "seed")  # passed to the bare script
SERVED, LATER, FIRST = "ml_workflow.py, servers up", "no servers, a later run", "no servers, the first run"


def time_phases(text: str, start: float, end: float) -> dict[str, float]:
    """Return the duration in seconds of each phase of a run, from the timestamps in its log."""
    day = datetime.fromtimestamp(start).date()
    marks = [("", start)]
    for line in text.splitlines():
        match = re.match(
            r"(\d\d:\d\d:\d\d\.\d+) \|.*?(?:(Beginning flow run)|Task run '(\w+)-.*Finished|(Finished in state))", line
        )
        if match:
            name = "imports, connections" if match[2] else match[3] or "end of the flow"
            marks.append((name, datetime.combine(day, datetime.strptime(match[1], "%H:%M:%S.%f").time()).timestamp()))
    marks.append(("exit", end))
    return {name: at - before for (_, before), (name, at) in itertools.pairwise(marks)}


def measure_rounds(count: int, source: Path, root: Path, served: dict) -> tuple[dict[str, list], list[dict]]:
    """Run each program in turn; return their times and peak memory, and the phases of the runs with servers.

    Args:
        count: rounds
        source: the folder of photos
        root: for the state of the runs
        served: the settings of runs with servers
    """
    figures, phases = {}, []
    flow, alone = ["ml_workflow.py", "--source", source], choose_settings(root / "alone")
    options = [f"--{name.replace('_', '-')}={getattr(ml_workflow, name.upper())}" for name in PARAMETERS]
    run_python(flow, **alone)
    run_python(flow, **served)
    for number in range(count):
        for name, command, settings in (
            (NOTEBOOK, ["benchmarks/notebook.py", source], {}),
            (BARE, ["benchmarks/bare.py", source, *options], {}),
            (SERVED, flow, served),
            (LATER, flow, alone),
            (FIRST, flow, choose_settings(root / f"fresh-{number}")),
        ):
            start = time.time()
            seconds, memory, text = run_python(command, **settings)
            figures.setdefault(name, []).append((seconds, memory))
            if name == SERVED:
                phases.append(time_phases(text, start, start + seconds))
        print(f"round {number + 1} of {count}", file=sys.stderr)
    return figures, phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="20 photos in one folder per class")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = arguments.source.resolve() if arguments.source else root / "photos"
        if not arguments.source:
            write_photos(source, 20, [1500])
        photos = len(list(source.glob("*/*")))
        with start_both_servers(root / "served") as served:
            figures, phases = measure_rounds(arguments.rounds, source, root, served)
    table = {name: np.median(rows, axis=0) for name, rows in figures.items()}
    print(f"{photos} photos, median of {arguments.rounds}; {describe_machine()}")
    print(f"{'':34}{'seconds':>9}{'of the notebook':>17}{'more than bare':>16}{'peak MB':>9}")
    for name, (seconds, memory) in table.items():
        ratio, more = seconds / table[NOTEBOOK][0], seconds - table[BARE][0]
        print(f"{name:34}{seconds:9.1f}{ratio:17.2f}{more:14.1f} s{memory:9.0f}")
    print(f"\nphases of '{SERVED}' in seconds")
    for name in phases[0]:
        print(f"{name:34}{np.median([run.get(name, 0) for run in phases]):9.1f}")


if __name__ == "__main__":
    main()
