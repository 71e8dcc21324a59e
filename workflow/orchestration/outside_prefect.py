"""Run the pipeline's tasks as plain functions under another orchestrator: `train_model.fn(...)`."""

from collections.abc import Iterator
from contextlib import contextmanager

from workflow.orchestration.progress import is_prefect_lost

import mlflow
from prefect.logging import disable_run_logger


@contextmanager
def outside_prefect(experiment: str, run_id: str | None = None) -> Iterator[str]:
    """Open an MLflow run for tasks, send nothing to Prefect, and yield the run's id.

    Args:
        experiment: name of the MLflow experiment
        run_id: run to continue; None to start a new one
    """
    is_prefect_lost.set()
    mlflow.set_experiment(experiment)
    with disable_run_logger(), mlflow.start_run(run_id) as run:
        yield run.info.run_id
