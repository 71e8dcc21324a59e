"""The whole command beside the lab's notebook as a plain script, and beside a bare Keras script of our own model.

    python benchmarks/whole_run.py [--source FOLDER] [--rounds N]

All train in turn on the same 20 photos, drawn ones of 1500 pixels without --source. Nothing may listen on the ports of
Prefect (4200) and MLflow (5000), because a run without servers would use what is there.
"""

import argparse
import contextlib
import itertools
import re
import socket
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import measure
from measure import PROJECT, both_servers, copy, machine, run

import numpy as np

HERE = Path(__file__).resolve().parent
NOTEBOOK, BARE = "the lab's notebook as a script", "our model as a bare script"
SERVED, LATER, FIRST = "ml_workflow.py, servers up", "no servers, a later run", "no servers, the first run"


def phases(text: str, start: float, end: float) -> dict[str, float]:
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
    parser.add_argument("--source", type=Path, help="20 photos, one folder a class")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for port in (4200, 5000):
        with contextlib.closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                sys.exit(f"port {port} is taken: stop what listens there")
    figures, parts = {}, []
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as servers:
        source = arguments.source.resolve() if arguments.source else measure.draw(Path(place, "photos"), 10, 1500)
        flow = ["ml_workflow.py", "--source", source]
        alone, served = copy(Path(place, "alone")), copy(Path(place, "served"))
        urls = servers.enter_context(both_servers(served))
        run(flow, alone)
        run(flow, served, **urls)
        for number in range(arguments.rounds):
            fresh = copy(Path(place, f"fresh-{number}"))
            for name, command, folder, settings in (
                (NOTEBOOK, [HERE / "notebook.py", source], PROJECT, {}),
                (BARE, [HERE / "bare.py", source], PROJECT, {}),
                (SERVED, flow, served, urls),
                (LATER, flow, alone, {}),
                (FIRST, flow, fresh, {}),
            ):
                start = time.time()
                seconds, memory, text = run(command, folder, **settings)
                figures.setdefault(name, []).append((seconds, memory))
                if name == SERVED:
                    parts.append(phases(text, start, start + seconds))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    table = {name: np.median(rows, axis=0) for name, rows in figures.items()}
    print(f"{len(list(source.glob('*/*')))} photos, median of {arguments.rounds}; {machine()}")
    print(f"{'':34}{'seconds':>9}{'of the notebook':>17}{'more than bare':>16}{'peak MB':>9}")
    for name, (seconds, memory) in table.items():
        ratio, more = seconds / table[NOTEBOOK][0], seconds - table[BARE][0]
        print(f"{name:34}{seconds:9.1f}{ratio:17.2f}{more:14.1f} s{memory:9.0f}")
    print(f"\nwhere the seconds of '{SERVED}' go")
    for name in parts[0]:
        print(f"{name:34}{np.median([one.get(name, 0) for one in parts]):9.1f}")


if __name__ == "__main__":
    main()
