"""The five steps as a Kubeflow pipeline, with typed artifacts, and the gate as a condition.

    python examples/kubeflow/pipeline.py pipeline.yaml     # compile it for Kubeflow Pipelines

Components are containers that share no folder, so the contents of `dataset/` and `models/` are passed as artifacts.
The containers' image has this repository as its working folder, with its requirements installed (see Dockerfile), and
they must be able to reach the MLflow server at `tracking_uri`. Unlike ml_workflow.py, which registers every version,
this pipeline registers a model only if the gate promotes it.
"""

import sys

from kfp import compiler, dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

IMAGE = "ml-workflow"


@dsl.component(base_image=IMAGE)
def download(source: str, images: Output[Dataset]):
    """Download the images at a URL, copy a folder, or unpack a ZIP file; the container must have access to it."""
    import os
    import shutil
    from pathlib import Path

    from ml_workflow import download_data
    from workflow.data.source import check_source

    from prefect.logging import disable_run_logger

    check_source(source)
    if os.path.isdir(source):
        shutil.copytree(source, images.path)
    else:
        with disable_run_logger():
            download_data.fn(source, Path(images.path))


@dsl.component(base_image=IMAGE)
def preprocess(source: str, images: Input[Dataset], tracking_uri: str, prepared: Output[Dataset]) -> str:
    """Compute the features of the images, and return the id of the pipeline's MLflow run."""
    import os
    from pathlib import Path

    os.environ |= {"ML_WORKFLOW_STATE": prepared.path, "MLFLOW_TRACKING_URI": tracking_uri}
    from ml_workflow import EXPERIMENT, preprocess_data
    from workflow.orchestration.outside_prefect import outside_prefect

    with outside_prefect(EXPERIMENT) as run_id:
        splits = preprocess_data.fn(Path(images.path), source=source)
    prepared.metadata |= {split.split: str(len(split.labels)) for split in splits}  # a number would become 8.0
    return run_id


@dsl.component(base_image=IMAGE)
def train(
    source: str,
    images: Input[Dataset],
    prepared: Input[Dataset],
    tracking_uri: str,
    run_id: str,
    epochs: int,
    seed: int,
    model: Output[Model],
):
    """Train the model, in a folder named after the MLflow run."""
    import os
    from pathlib import Path

    os.environ |= {"ML_WORKFLOW_STATE": prepared.path, "MLFLOW_TRACKING_URI": tracking_uri}
    import ml_workflow
    from workflow.orchestration.outside_prefect import outside_prefect

    ml_workflow.MODEL_FOLDER = Path(model.path)
    with outside_prefect(ml_workflow.EXPERIMENT, run_id):
        training, validation, _ = ml_workflow.preprocess_data.fn(Path(images.path), seed=seed, source=source)
        ml_workflow.train_model.fn(training, validation, epochs=epochs, seed=seed)


@dsl.component(base_image=IMAGE)
def evaluate(
    source: str,
    images: Input[Dataset],
    prepared: Input[Dataset],
    tracking_uri: str,
    run_id: str,
    model: Input[Model],
    metrics: Output[Metrics],
    evaluated: Output[Artifact],
) -> bool:
    """Evaluate the model, compare it with the champion, and return whether the gate promotes it.

    There is no other output parameter, because kfp.local (2.17) finds the value of a condition only under the name
    Output.
    """
    import os
    import shutil
    from pathlib import Path

    os.environ |= {"ML_WORKFLOW_STATE": prepared.path, "MLFLOW_TRACKING_URI": tracking_uri}
    from ml_workflow import EXPERIMENT, evaluate_model, preprocess_data
    from workflow.evaluation import gate
    from workflow.orchestration.outside_prefect import outside_prefect
    from workflow.records import Evaluation

    shutil.copytree(model.path, evaluated.path)
    folder = Path(evaluated.path, run_id)
    with outside_prefect(EXPERIMENT, run_id):
        _, _, test = preprocess_data.fn(Path(images.path), source=source)
        evaluate_model.fn(str(folder / "model.keras"), test)
    evaluation = Evaluation.read(folder / "evaluation.json")
    metrics.log_metric("test_accuracy", evaluation.test.accuracy)
    metrics.log_metric("test_loss", evaluation.test.loss)
    decision = gate.decide(evaluation.candidate, evaluation.comparison, evaluation.unevaluated)
    print(decision.reason)
    return decision.promoted


@dsl.component(base_image=IMAGE)
def register(evaluated: Input[Artifact], tracking_uri: str, run_id: str) -> str:
    """Register the model as the new champion, and return its version."""
    import os
    from pathlib import Path

    os.environ |= {"MLFLOW_TRACKING_URI": tracking_uri}
    from ml_workflow import EXPERIMENT, register_model
    from workflow.orchestration.outside_prefect import outside_prefect

    with outside_prefect(EXPERIMENT, run_id):
        return register_model.fn(str(Path(evaluated.path, run_id, "model.keras")))


@dsl.pipeline(name="ml-workflow", description="From photos to a registered classifier, in five steps.")
def ml_workflow(source: str, tracking_uri: str, epochs: int = 20, seed: int = 42):
    images = download(source=source).outputs["images"]
    preprocessed = preprocess(source=source, images=images, tracking_uri=tracking_uri)
    shared = {
        "source": source,
        "images": images,
        "prepared": preprocessed.outputs["prepared"],
        "tracking_uri": tracking_uri,
    }
    run_id = preprocessed.outputs["Output"]
    trained = train(**shared, run_id=run_id, epochs=epochs, seed=seed)
    evaluation = evaluate(**shared, run_id=run_id, model=trained.outputs["model"])
    with dsl.If(evaluation.outputs["Output"] == True, name="promoted"):  # noqa: E712  # compiled into a condition
        register(evaluated=evaluation.outputs["evaluated"], tracking_uri=tracking_uri, run_id=run_id)


if __name__ == "__main__":
    compiler.Compiler().compile(ml_workflow, sys.argv[1])
