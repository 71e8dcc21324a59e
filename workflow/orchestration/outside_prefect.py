"""Run the pipeline's tasks as plain functions in another orchestrator: `train_model.fn(...)`."""

from collections.abc import Iterator
from contextlib import contextmanager

from workflow.orchestration.progress import prefect_is_unreachable

import mlflow
from prefect.logging import disable_run_logger


@contextmanager
def outside_prefect(experiment: str, run_id: str | None = None) -> Iterator[str]:
    """Start or continue an MLflow run for tasks that send nothing to Prefect, and yield its id.

    Args:
        experiment: name of the MLflow experiment
        run_id: run to continue; None to start a new one
    """
    prefect_is_unreachable.set()
    mlflow.set_experiment(experiment)
    with disable_run_logger(), mlflow.start_run(run_id) as run:
        yield run.info.run_id
