"""The same five steps as a Kubeflow pipeline: components with typed artifacts, and the gate as a condition.

    python examples/kubeflow/pipeline.py pipeline.yaml     # what Kubeflow Pipelines runs

A component is a container: it gets inputs, leaves outputs, and shares no folder with the others. So what lies in
`dataset/` and `models/` under Prefect travels here as artifacts. The image of the containers has this repository as its
working folder and its requirements installed (see Dockerfile). The MLflow server at `tracking_uri` has to be reachable
from there. Where the gate is closed, nothing is registered; ml_workflow.py registers every version.
"""

import sys

from kfp import compiler, dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

IMAGE = "ml-workflow"


@dsl.component(base_image=IMAGE)
def download(source: str, images: Output[Dataset]):
    """The images of a URL, whole, or those of a folder that the container sees."""
    import shutil
    from pathlib import Path

    from ml_workflow import download_data
    from workflow.data.source import check_source, is_url

    from prefect.logging import disable_run_logger

    check_source(source)
    if is_url(source):
        with disable_run_logger():
            download_data.fn(source, Path(images.path))
    else:
        shutil.copytree(source, images.path)


@dsl.component(base_image=IMAGE)
def preprocess(source: str, images: Input[Dataset], tracking_uri: str, prepared: Output[Dataset]) -> str:
    """The features of the images; returns the id of the MLflow run that this pipeline logs to."""
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
    """The trained model, in a folder that is named after the MLflow run."""
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
    """Evaluates the model and compares it with the champion; returns whether the gate opens.

    It has no other output parameter: kfp.local (2.17) finds the value of a condition only under the name Output.
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
    """Registers the model and makes it the champion; returns its version."""
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
    ready = preprocess(source=source, images=images, tracking_uri=tracking_uri)
    shared = {"source": source, "images": images, "prepared": ready.outputs["prepared"], "tracking_uri": tracking_uri}
    run_id = ready.outputs["Output"]
    trained = train(**shared, run_id=run_id, epochs=epochs, seed=seed)
    judged = evaluate(**shared, run_id=run_id, model=trained.outputs["model"])
    with dsl.If(judged.outputs["Output"] == True, name="the gate opens"):  # noqa: E712  # it is a condition of the pipeline
        register(evaluated=judged.outputs["evaluated"], tracking_uri=tracking_uri, run_id=run_id)


if __name__ == "__main__":
    compiler.Compiler().compile(ml_workflow, sys.argv[1])
