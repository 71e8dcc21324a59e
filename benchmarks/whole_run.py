"""The whole command beside the lab's notebook as a plain script, and beside a bare Keras script of our own model.

    python benchmarks/whole_run.py [--source FOLDER] [--rounds N]

All train in turn on the same 20 photos, drawn ones of 1500 pixels without --source. Each run of ml_workflow.py keeps
its state in a temporary folder, and uses the servers that are started here, or none.
"""

import argparse
import contextlib
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

NOTEBOOK, BARE = "the lab's notebook as a script", "our model as a bare script"
PARAMETERS = ("epochs", "batch_size", "learning_rate", "dropout", "seed")  # whose defaults the bare script is given
SERVED, LATER, FIRST = "ml_workflow.py, servers up", "no servers, a later run", "no servers, the first run"


def time_phases(text: str, start: float, end: float) -> dict[str, float]:
    """The seconds of each part of a run, from the times in its log."""
    day = datetime.fromtimestamp(start).date()
    marks = [("", start)]
    for line in text.splitlines():
        found = re.match(
            r"(\d\d:\d\d:\d\d\.\d+) \|.*?(?:(Beginning flow run)|Task run '(\w+)-.*Finished|(Finished in state))", line
        )
        if found:
            name = "imports, servers found" if found[2] else found[3] or "end of the flow"
            marks.append((name, datetime.combine(day, datetime.strptime(found[1], "%H:%M:%S.%f").time()).timestamp()))
    marks.append(("exit", end))
    return {name: at - before for (_, before), (name, at) in itertools.pairwise(marks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="20 photos, one folder per class")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures, parts = {}, []
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as servers:
        place = Path(place)
        if arguments.source:
            source = arguments.source.resolve()
        else:
            write_photos(source := place / "photos", 20, [1500])
        photos = len(list(source.glob("*/*")))
        flow, alone = ["ml_workflow.py", "--source", source], choose_settings(place / "alone")
        options = [f"--{name.replace('_', '-')}={getattr(ml_workflow, name.upper())}" for name in PARAMETERS]
        served = servers.enter_context(start_both_servers(place / "served"))
        run_python(flow, **alone)
        run_python(flow, **served)
        for number in range(arguments.rounds):
            for name, command, settings in (
                (NOTEBOOK, ["benchmarks/notebook.py", source], {}),
                (BARE, ["benchmarks/bare.py", source, *options], {}),
                (SERVED, flow, served),
                (LATER, flow, alone),
                (FIRST, flow, choose_settings(place / f"fresh-{number}")),
            ):
                start = time.time()
                seconds, memory, text = run_python(command, **settings)
                figures.setdefault(name, []).append((seconds, memory))
                if name == SERVED:
                    parts.append(time_phases(text, start, start + seconds))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    table = {name: np.median(rows, axis=0) for name, rows in figures.items()}
    print(f"{photos} photos, median of {arguments.rounds}; {describe_machine()}")
    print(f"{'':34}{'seconds':>9}{'of the notebook':>17}{'more than bare':>16}{'peak MB':>9}")
    for name, (seconds, memory) in table.items():
        ratio, more = seconds / table[NOTEBOOK][0], seconds - table[BARE][0]
        print(f"{name:34}{seconds:9.1f}{ratio:17.2f}{more:14.1f} s{memory:9.0f}")
    print(f"\nwhere the seconds of '{SERVED}' go")
    for name in parts[0]:
        print(f"{name:34}{np.median([one.get(name, 0) for one in parts]):9.1f}")


if __name__ == "__main__":
    main()
