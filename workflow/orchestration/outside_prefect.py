"""The pipeline's tasks as plain functions, where another orchestrator runs them: `train_model.fn(...)`."""

from collections.abc import Iterator
from contextlib import contextmanager

from workflow.orchestration.progress import prefect_is_gone

import mlflow
from prefect.logging import disable_run_logger


@contextmanager
def outside_prefect(experiment: str, run_id: str | None = None) -> Iterator[str]:
    """The id of the MLflow run that a task logs to, a new one without `run_id`; Prefect is asked nothing meanwhile."""
    prefect_is_gone.set()
    mlflow.set_experiment(experiment)
    with disable_run_logger(), mlflow.start_run(run_id) as run:
        yield run.info.run_id
