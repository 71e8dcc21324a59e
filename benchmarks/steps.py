"""One folder of images through the steps of ml_workflow.py, in a process of its own: the part of growth.py.

    ML_WORKFLOW_STATE=PLACE python benchmarks/steps.py FOLDER EPOCHS

Prints, as JSON, the seconds of each step and the peak memory in MB after it; PLACE, a new folder, keeps what the steps
leave. The first preprocessing computes the features of the backbone, the second one finds them.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path

import lib  # noqa: F401  (it makes the project's files importable)

import ml_workflow
from workflow.orchestration import progress
from workflow.settings import settings
from workflow.tracking.connection import connect_mlflow

import mlflow
from prefect.logging import disable_run_logger

folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
figures = {}


def timed(name: str, step, *arguments, **options):
    start = time.perf_counter()
    result = step(*arguments, **options)
    figures[name] = (time.perf_counter() - start, peak())
    return result


def peak() -> float:
    """The peak memory of this process in MB; on Linux without that of the process that started it."""
    if sys.platform == "linux":
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def main() -> None:
    import keras  # noqa: F401  (its import belongs to none of the steps)

    progress.is_prefect_lost.set()  # Prefect has no part in this
    connect_mlflow(settings.mlflow_url, settings.state, "growth")
    with disable_run_logger(), mlflow.start_run():
        timed("preprocess", ml_workflow.preprocess_data.fn, folder)  # its result is not kept
        gc.collect()  # or the memory that is measured next would hold the datasets twice
        train, validation, test = timed("preprocess again", ml_workflow.preprocess_data.fn, folder)
        model_file = timed("train", ml_workflow.train_model.fn, train, validation, epochs)
        timed("evaluate", ml_workflow.evaluate_model.fn, model_file, test)
        timed("register", ml_workflow.register_model.fn, model_file)
    print(json.dumps(figures))


main()
