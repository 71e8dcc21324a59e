"""Measure whether a run gets slower with the number of earlier runs in the databases of Prefect and MLflow.

    python benchmarks/history.py [--earlier 1 100 1000] [--rounds 5]

The earlier runs are created through the clients of Prefect and MLflow: each has a flow run with five task runs and 70
log lines, and an MLflow run with parameters and 60 epochs of four metrics. The measured run trains for two epochs,
with both servers running.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from lib.machine import describe_machine
from lib.processes import run_python, start_both_servers

import ml_workflow

import mlflow
import numpy as np
from mlflow.entities import Metric, Param
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import LogCreate
from prefect.states import Completed

TASKS = [
    ml_workflow.download_data,
    ml_workflow.preprocess_data,
    ml_workflow.train_model,
    ml_workflow.evaluate_model,
    ml_workflow.register_model,
]
FLOW = ["ml_workflow.py", "--source", "sample_images", "--epochs", "2"]


def add_mlflow_runs(uri: str, count: int) -> None:
    """Add finished runs to the experiment of ml_workflow.py."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(ml_workflow.EXPERIMENT).experiment_id
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, 0.5, now, step) for step in range(60) for name in ("loss", "accuracy", "val_loss", "val_accuracy")
    ]
    parameters = [Param(name, "1") for name in ("epochs", "batch_size", "learning_rate", "seed", "data_digest")]
    for _ in range(count):
        run_id = client.create_run(experiment).info.run_id
        client.log_batch(run_id, metrics, parameters)
        client.set_terminated(run_id)


def add_flow_runs(url: str, count: int) -> None:
    """Add completed flow runs of ml_workflow.py."""
    with SyncPrefectClient(url) as client:
        for _ in range(count):
            run_id = client.create_flow_run(ml_workflow.ml_workflow, state=Completed()).id
            for number, task in enumerate(TASKS):
                client.create_task_run(task, run_id, dynamic_key=str(number), state=Completed())
            now = datetime.now(UTC)
            line = {"name": "prefect.flow_runs", "level": 20, "timestamp": now, "flow_run_id": run_id}
            client.create_logs([LogCreate(message=f"line {number}", **line) for number in range(70)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--earlier", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as servers:
        settings = {}
        for earlier in arguments.earlier:
            state = Path(root, str(earlier))
            settings[earlier] = servers.enter_context(start_both_servers(state))
            run_python(FLOW, **settings[earlier])
            add_mlflow_runs(f"sqlite:///{state / 'mlflow.db'}", earlier - 1)  # much faster than through the server
            add_flow_runs(f"{settings[earlier]['ML_WORKFLOW_PREFECT_URL']}/api", earlier - 1)
            print(f"{earlier} earlier run(s) added", file=sys.stderr)
        for number in range(arguments.rounds):
            for earlier in arguments.earlier:
                seconds = run_python(FLOW, **settings[earlier])[0]
                figures.setdefault(earlier, []).append(seconds)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    first = np.median(figures[arguments.earlier[0]])
    print(f"median of {arguments.rounds}; {describe_machine()}")
    print(f"{'earlier runs':>12}{'seconds':>9}{'ratio':>7}")
    for earlier, seconds in figures.items():
        print(f"{earlier:12}{np.median(seconds):9.1f}{np.median(seconds) / first:7.2f}")


if __name__ == "__main__":
    main()
