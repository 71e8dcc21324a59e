"""Run the pipeline steps on one folder of images in this process; growth.py starts this script.

    ML_WORKFLOW_STATE=STATE python benchmarks/steps.py FOLDER EPOCHS

It prints the time of each step in seconds and the peak memory in MB after it, as JSON. STATE is a new folder. The first
preprocessing computes the features, the second finds them in the cache.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path

import lib  # noqa: F401  (makes the project importable)

import ml_workflow
from workflow.orchestration import progress
from workflow.settings import settings
from workflow.tracking.connection import connect_mlflow

import mlflow
from prefect.logging import disable_run_logger

folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
figures = {}


def measure(name: str, step, *arguments):
    """Run a step, record its time and the peak memory, and return its result."""
    start = time.perf_counter()
    result = step(*arguments)
    figures[name] = (time.perf_counter() - start, peak_memory())
    return result


def peak_memory() -> float:
    """Return the peak memory of this process in MB; on Linux, ru_maxrss would include that of the parent process."""
    if sys.platform == "linux":
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def main() -> None:
    import keras  # noqa: F401  (its import is not part of a step)

    progress.prefect_is_unreachable.set()  # the steps run without Prefect
    connect_mlflow(settings.mlflow_url, settings.state, "growth")
    with disable_run_logger(), mlflow.start_run():
        measure("preprocess", ml_workflow.preprocess_data.fn, folder)  # without keeping its result
        gc.collect()  # otherwise the datasets would be in memory twice
        train, validation, test = measure("preprocess again", ml_workflow.preprocess_data.fn, folder)
        model_file = measure("train", ml_workflow.train_model.fn, train, validation, epochs)
        measure("evaluate", ml_workflow.evaluate_model.fn, model_file, test)
        measure("register", ml_workflow.register_model.fn, model_file)
    print(json.dumps(figures))


main()
