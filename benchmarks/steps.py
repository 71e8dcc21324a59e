"""One folder of images through the steps of ml_workflow.py, in a process of its own: the part of growth.py.

    python benchmarks/steps.py FOLDER PLACE EPOCHS

Prints, as JSON, the seconds of each step and the peak memory in MB after it; PLACE keeps what the steps leave. The
first preprocessing computes the features of the backbone, the second one finds them.
"""

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ml_workflow
from workflow.running import tracking

import mlflow
from prefect.logging import disable_run_logger

folder, place, epochs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
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

    tracking.silent.set()  # Prefect has no part in this
    ml_workflow.DATASET, ml_workflow.MODEL_FOLDER = place / "dataset", place / "models"
    mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("growth", (place / "mlartifacts").as_uri()))
    with disable_run_logger(), mlflow.start_run():
        datasets = timed("preprocess", ml_workflow.preprocess_data.fn, folder)
        timed("preprocess again", ml_workflow.preprocess_data.fn, folder)
        train, validation, test = datasets
        model_file = timed("train", ml_workflow.train_model.fn, train, validation, epochs)
        timed("evaluate", ml_workflow.evaluate_model.fn, model_file, test)
        timed("register", ml_workflow.register_model.fn, model_file)
    print(json.dumps(figures))


main()
