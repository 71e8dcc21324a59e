"""The time of a run beside 1, 100 and 1,000 earlier runs in both databases.

    python benchmarks/history.py [--sizes 1 100 1000] [--rounds N]

Without servers, in turn, on the drawn images of sample_images.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import PROJECT, copy, machine, run, serving

import numpy as np

sys.path.insert(0, str(PROJECT))
import ml_workflow

import mlflow
import requests
from mlflow.entities import Metric, Param

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


def fill_mlflow(project: Path, count: int) -> None:
    """Runs with the parameters and the metrics of as many epochs as a run has."""
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(ml_workflow.EXPERIMENT).experiment_id
    for number in range(count):
        run_id = client.create_run(experiment, run_name=f"earlier-{number}").info.run_id
        metrics = [Metric(name, 0.5, number, step) for name in METRICS for step in range(ml_workflow.EPOCHS)]
        parameters = [Param("epochs", str(ml_workflow.EPOCHS)), Param("batch_size", str(ml_workflow.BATCH_SIZE))]
        client.log_batch(run_id, metrics, parameters)
        client.create_model_version("apples-oranges", f"runs:/{run_id}/model", run_id)
        client.set_terminated(run_id)


def fill_prefect(project: Path, count: int) -> None:
    """Completed flow runs with their five task runs."""
    command, home = ["prefect", "server", "start", "--no-prompt", "--port"], str(project / "prefect_home")
    with serving(command, "/api/health", project, PREFECT_HOME=home) as url, requests.Session() as session:

        def post(path: str, **body) -> str:
            state = {} if path == "flows" else {"state": {"type": "COMPLETED"}}
            answer = session.post(f"{url}/api/{path}/", json=body | state, timeout=60)
            answer.raise_for_status()
            return answer.json()["id"]

        flow = post("flows", name="ml_workflow")
        for number in range(count):
            flow_run = post("flow_runs", flow_id=flow, name=f"earlier-{number}")
            for task in ("download_data", "preprocess_data", "train_model", "evaluate_model", "register_model"):
                post("task_runs", flow_run_id=flow_run, task_key=task, dynamic_key="0", name=task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        projects = {size: copy(Path(place, str(size))) for size in arguments.sizes}
        for size, project in projects.items():
            run(["ml_workflow.py", "--source", "sample_images"], project)
            fill_mlflow(project, size - 1)
            fill_prefect(project, size - 1)
            print(f"{size} earlier runs made", file=sys.stderr)
        rows = [
            [run(["ml_workflow.py", "--source", "sample_images"], project)[:2] for project in projects.values()]
            for _ in range(arguments.rounds)
        ]
    print(f"median of {arguments.rounds}; {machine()}")
    print(f"{'earlier runs':>12}{'seconds':>9}{'ratio':>7}{'peak MB':>9}")
    table = np.median(rows, axis=0)
    for size, (seconds, memory) in zip(projects, table, strict=True):
        print(f"{size:12,}{seconds:9.1f}{seconds / table[0][0]:7.2f}{memory:9.0f}")


if __name__ == "__main__":
    main()
