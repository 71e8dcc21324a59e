"""Train and register an image classifier, in one Prefect flow and one MLflow run.

    python ml_workflow.py
    python ml_workflow.py --source FOLDER      # your own images, one folder per class

Functions appear in execution order: download, preprocess, train, evaluate, register. Tasks import TensorFlow
themselves, because the import takes seconds and bad input should be reported first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves this folder out

import argparse
import inspect
from importlib.metadata import version
from typing import Any, Final, Literal, get_args

from workflow import image_classifier
from workflow.cli import Parser, command_line, parse_as
from workflow.data.data_issues import collect_issues
from workflow.data.datasets import ImageDataset
from workflow.data.download import IncompleteError, UnavailableError, fetch_images, is_usable
from workflow.data.folder import check_classes, digest_files, mark_duplicates
from workflow.data.prepare import prepare_features, prepare_pixels
from workflow.data.source import absolute_source, copy_samples, is_url, remove_samples, resolve_source, unpack_source
from workflow.data.split import split_images
from workflow.errors import explain_os_errors
from workflow.evaluation import comparison, gate, metrics, plots, report
from workflow.evaluation.evidence import cross_validate
from workflow.evaluation.folds import fold_by_group
from workflow.model import backbone as pretrained
from workflow.model import backbone_weights, novelty
from workflow.model.feature_set import FeatureSet
from workflow.model.head import add_backbone, build_head, compile_model, fit_head
from workflow.model.keras_import import import_keras
from workflow.model.small_network import build_small_network
from workflow.orchestration import cluster, flow_runs, logs
from workflow.orchestration.connection import connect_servers
from workflow.orchestration.parameters import Count, Cron, Fraction, ModelName, Rate, Seed
from workflow.orchestration.progress import Progress, publish_report, show_epochs
from workflow.orchestration.summary import describe_last_run
from workflow.records import SPLITS, Artifact, Evaluation, Evidence
from workflow.serving import litert
from workflow.settings import PROJECT, settings
from workflow.signals import DeferredSignals
from workflow.tracking import registry
from workflow.tracking.logging import check_logged_epochs, find_logged_model, log_data, log_evaluation, log_evidence
from workflow.tracking.run import active_run, last_run

import mlflow
from prefect import Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Completed, State
from prefect.tasks import exponential_backoff

# Tracking
TRACKING_URI = settings.mlflow_url  # http://127.0.0.1:5000; without a server there, runs are stored in mlflow.db
EXPERIMENT = "ml-workflow"
PREFECT_HOME = settings.state / "prefect_home"  # history of runs made without a Prefect server

# Download
SOURCE = settings.lab_url  # the lab's folder on GitHub
FILES = [f"{fruit}s/{fruit}-{number}.jpeg" for fruit in ("apple", "orange") for number in range(1, 11)]
SAMPLES = PROJECT / "sample_images"  # synthetic images, used if the default source is unavailable
DATASET = settings.state / "dataset"
DATA_FOLDER = DATASET / "images"
MAX_DOWNLOADS = 4  # concurrent

# Preprocess
BACKBONE: Final = pretrained.NAME  # feature extractor; "none" trains a small network on the pixels instead
SMALL_SIZE = 64  # width and height of the small network's input, in pixels
TEST_FRACTION, VALIDATION_FRACTION = 0.1, 0.1  # of each class, but at least one image
SPLIT_SALT = 11  # change it to reassign images to splits
BATCH_SIZE = 8  # images

# Train
EPOCHS = 20  # enough for a head; the small network improves until about epoch 45
LEARNING_RATE = 0.03  # initial value of a cosine decay to 0
DROPOUT = 0.1  # fraction of the features set to 0 in each training step
SEED = 42
MODEL_FOLDER = settings.state / "models"  # scratch folders of runs in progress; models are stored in MLflow

Backbone = Literal["efficientnet-lite0", "none"]
BACKBONES = get_args(Backbone)
NOT_PROMOTED = 3  # exit status
EXIT_STATUS = (
    f"exit status: 0 if the run succeeded, 1 if it failed, 2 if the command line was invalid, {NOT_PROMOTED} if the "
    "run succeeded but, with --require-champion, its version did not become the champion"
)
PACKAGES = ("mlflow", "tensorflow", "keras", "numpy", "pillow")  # required to serve a model


def is_incomplete(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return whether the download was cut off. Other errors are permanent, or have been retried."""
    return isinstance(state.result(raise_on_failure=False).__cause__, IncompleteError)


@task(retries=2, retry_delay_seconds=exponential_backoff(1), retry_jitter_factor=0.5, retry_condition_fn=is_incomplete)
def download_data(source: str = SOURCE, folder: Path = DATA_FOLDER) -> None:
    """Download the missing FILES into the folder, or unpack the source there if it is a ZIP file.

    If the default source is unavailable, copy SAMPLES instead. A later run removes them once the download succeeds.

    Raises:
        WorkflowError: an image cannot be downloaded, or the ZIP file cannot be unpacked
    """
    logger = get_run_logger()
    if not is_url(source):
        return logger.info(unpack_source(source, folder))
    missing = [name for name in FILES if not is_usable(folder / name)]
    try:
        fetch_images(source, missing, folder, MAX_DOWNLOADS)
    except UnavailableError as error:
        if source != SOURCE or any((folder / name).exists() for name in FILES):
            raise
        logger.warning("Using the synthetic images in sample_images instead of the lab's photos: %s", error)
        return copy_samples(SAMPLES, folder)
    remove_samples(SAMPLES, folder)
    return logger.info("%d images downloaded, %d already present", len(missing), len(FILES) - len(missing))


@task(cache_policy=NO_CACHE)
def preprocess_data(
    folder: Path = DATA_FOLDER,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
    backbone: Backbone = BACKBONE,
    dask: str | None = None,
    source: str | None = None,
    name: str = "",
) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Verify the images, compute or load their features, and assign each image to a split by its content.

    Unusable files are skipped, and listed in MLflow with the reason. With backbone "none", the inputs are pixels of
    shape (SMALL_SIZE, SMALL_SIZE, 3).

    Args:
        dask: address of a Dask scheduler whose workers compute the features
        source: where the images were downloaded from
        name: name of the registered model; "" names it after the classes

    Raises:
        WorkflowError: a class has too few usable images
    """
    images = mark_duplicates(digest_files(folder, DATASET))
    if backbone == "none":
        prepared = prepare_pixels(images, folder, SMALL_SIZE)
    else:
        progress = Progress("features", "Images whose features have been computed", "features computed")
        prepared = prepare_features(images, folder, DATASET, cluster.workers(dask), progress)
    images = split_images(prepared.images, TEST_FRACTION, VALIDATION_FRACTION, SPLIT_SALT, prepared.duplicate_of)
    source = source or (SOURCE if folder == DATA_FOLDER else str(folder))
    data = prepared.to_data_version(images, source, folder, SAMPLES, name)
    log_data(data, registry.model_name(data.class_names, name))
    get_run_logger().info(data.describe_splits())
    check_classes(images)
    train, validation, test = (
        ImageDataset(split, prepared.inputs, data, batch_size, seed, backbone) for split in SPLITS
    )
    return train, validation, test


@task(cache_policy=NO_CACHE)
def train_model(
    train: ImageDataset,
    validation: ImageDataset,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = SEED,
    dropout: float = DROPOUT,
) -> str:
    """Train a model with autologging, and return the path of its file, in a folder named after the MLflow run.

    The model is trained on the training images and validated after each epoch. With a backbone, the head is then
    refitted on the training and validation images together, because more images make it more accurate.
    """
    import_keras()
    import keras
    import tensorflow as tf

    registry.check_champion(train.class_names, train.data.model_name)  # fail now, not after training
    tf.config.experimental.enable_op_determinism()
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    has_backbone, run_id = train.features is not None, active_run().info.run_id
    parameters = dict[str, Any](epochs=epochs, batch_size=train.batch_size, learning_rate=learning_rate, seed=seed)
    refit = "train+validation" if has_backbone else "no"
    mlflow.log_params(parameters | {"dropout": dropout, "backbone": train.backbone, "refit": refit})
    keras.utils.set_random_seed(seed)  # after the requests to MLflow, because their retries use Python's random module
    model = build_model(train, dropout, seed)
    compile_model(model, learning_rate, steps=epochs * len(train))
    with explain_os_errors(folder := MODEL_FOLDER / run_id), DeferredSignals() as signals:
        folder.mkdir(parents=True, exist_ok=True)
        options = {"epochs": epochs, "shuffle": False, "verbose": 0, "validation_data": validation.batches}
        history = model.fit(train.batches, callbacks=[show_epochs(epochs), signals.callback()], **options).history
        metrics.check_convergence(history)
        temperature = 1.0
        if has_backbone:
            model, temperature = refit_head(train.merge(validation), folder, dropout, **parameters)
        model.save_weights(folder / Artifact.WEIGHTS)  # with a backbone, only the head's: the backbone is frozen
        (add_backbone(model, temperature) if has_backbone else model).save(folder / Artifact.MODEL)
    log_training(history, folder, train)
    return str(folder / Artifact.MODEL)


def build_model(train: ImageDataset, dropout: float, seed: int):
    """Return an untrained Keras model: a head for features, or a small network for pixels."""
    if train.features is not None:
        return build_head(len(train.class_names), dropout, seed)
    return build_small_network(len(train.class_names), SMALL_SIZE, dropout, seed)


def refit_head(images: FeatureSet, folder: Path, dropout: float, seed: int, **parameters: Any) -> tuple[Any, float]:
    """Fit a head to all images and cross-validate it; write the results and the reference embeddings to the folder.

    Args:
        images: training and validation images
        folder: where the files are written
        dropout: fraction of the features set to 0 in each training step
        seed: random seed for the order of the images, the dropout and the folds
        parameters: epochs, batch_size and learning_rate

    Returns:
        The head, and the temperature that calibrates it.
    """
    evidence = cross_validate(images, dropout=dropout, seed=seed, **parameters)
    evidence.write(folder / Artifact.EVIDENCE)
    probabilities = {prediction.digest: prediction.probability for prediction in evidence.predictions}
    folds = fold_by_group(images, seed)
    novelty.write_reference_embeddings(images, folds, probabilities, seed, folder / Artifact.REFERENCE_EMBEDDINGS)
    return fit_head(images.features, images.labels, dropout, seed, **parameters), evidence.temperature


def log_training(history: dict[str, list[float]], folder: Path, train: ImageDataset) -> None:
    """Log the weights, the learning curves, the cross-validation results, and the model with its serving code.

    Args:
        history: metrics by epoch, from Keras
        folder: the run's scratch folder, which contains the files
        train: the training dataset
    """
    check_logged_epochs(folder.name, len(history["loss"]))
    mlflow.log_artifact(str(folder / Artifact.WEIGHTS), "weights")
    mlflow.log_artifact(str(plots.plot_learning_curves(history, folder / Artifact.LEARNING_CURVES)))
    files = {"model": str(folder / Artifact.MODEL)}
    config = {"class_names": train.class_names, "image_size": SMALL_SIZE, "unsure_below": None}
    if evidence := Evidence.find(folder / Artifact.EVIDENCE):
        log_evidence(evidence, folder)
        get_run_logger().info(metrics.describe_cross_validation(evidence))
        files["reference_embeddings"] = str(folder / Artifact.REFERENCE_EMBEDDINGS)
        config |= {"image_size": pretrained.IMAGE_SIZE, "unsure_below": evidence.unsure_below}
    mlflow.pyfunc.log_model(
        name="model",
        python_model=image_classifier.__file__,
        artifacts=files,
        model_config=config,
        metadata={"data_digest": train.data.digest},
        pip_requirements=[f"{name}=={version(name)}" for name in PACKAGES],
    )


@task(cache_policy=NO_CACHE)
def evaluate_model(model_file: str, test: ImageDataset) -> None:
    """Log the test metrics, compare the model with the champion, and write the evaluation for register_model.

    The model is evaluated exactly as MLflow serves it: the code logged with it reads the image files.
    """
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    folder = Path(model_file).parent
    evidence = Evidence.find(folder / Artifact.EVIDENCE)
    model_id = find_logged_model(mlflow.get_run(folder.name))
    model = registry.load_candidate(model_id)
    results = registry.evaluate_candidate(model, test)
    if test.features is not None:
        results = novelty.add_nearest_neighbors(results, test.features, folder / Artifact.REFERENCE_EMBEDDINGS)
    metrics.check_saturation(candidate := comparison.collect_predictions(results, evidence))
    evaluation = Evaluation(
        test=results,
        candidate=candidate,
        comparison=registry.compare_with_champion(model, results, evidence, test),
        data=test.data,
        issues=collect_issues(results.predictions + (evidence.predictions if evidence else []), test.data.issues),
        unevaluated=evidence.unevaluated if evidence else [],
    )
    evaluation.write(folder / Artifact.EVALUATION)
    report.explain_mistakes(model, results, test.data, folder)
    log_evaluation(evaluation, folder, model_id)
    get_run_logger().info(metrics.describe_test(results.predictions, evaluation.candidate))


@task
def register_model(model_file: str) -> str:
    """Register the evaluated model, promote it to champion if it passes the gate, and return its version."""
    folder = Path(model_file).parent
    run, evaluation = mlflow.get_run(folder.name), Evaluation.read(folder / Artifact.EVALUATION)
    evidence = Evidence.find(folder / Artifact.EVIDENCE)
    registered = registry.register_version(run, evaluation)
    decision = gate.decide(evaluation.candidate, evaluation.comparison, evaluation.unevaluated)
    if decision.promoted:  # before the alias is moved, because serve.py loads the version as soon as it is
        get_run_logger().info(litert.add_export(f"models:/{registered.name}/{registered.version}", evaluation.data))
    decision = registry.apply_decision(decision, registered, evaluation.comparison, folder.parent / ".gate.lock")
    summary = registry.log_decision(decision, registered, run, evaluation, evidence)
    parameters = {name: run.data.params[name] for name in ml_workflow.parameters.properties if name in run.data.params}
    sections = report.build_report(summary, decision, evaluation, evidence, parameters, folder)
    publish_report(summary, sections, folder.name)
    get_run_logger().info(summary)
    return str(registered.version)


def skip_unless_new(source: str, folder: Path, name: str) -> State[None] | None:
    """Return a run's final state if the newest version was trained on the source's current images, else None."""
    download_data.fn(source, folder)  # a plain call: a skipped flow run should show no tasks
    if (newest := registry.find_version_trained_on(digest_files(folder, DATASET), name)) is None:
        return None
    # Some pages of Prefect's UI (3.8) list only runs whose state has one of Prefect's own names.
    return Completed(name="Cached", message=f"no new images: {newest} was trained on the same ones")


@flow(name="ml_workflow", on_crashed=[flow_runs.mark_cancelled])
def ml_workflow(
    source: str = SOURCE,
    name: ModelName = "",
    epochs: Count = EPOCHS,
    batch_size: Count = BATCH_SIZE,
    learning_rate: Rate = LEARNING_RATE,
    seed: Seed = SEED,
    dropout: Fraction = DROPOUT,
    backbone: Backbone = BACKBONE,
    dask: str | None = None,
    only_new: bool = False,
) -> State[None] | None:
    """Run the five tasks in one flow run and one MLflow run, or with `only_new`, skip them if no image is new.

    Args:
        source: a folder with one subfolder per class, a ZIP file of such a folder, or the URL of the lab's 20 files
        name: name of the registered model, needed if two models have the same classes; by default, the class names
        epochs: passes over the training images
        batch_size: images per training step
        learning_rate: initial learning rate of the optimizer, which decays to 0
        seed: random seed; the same seed produces the same weights
        dropout: fraction of the features set to 0 in each training step
        backbone: pretrained network that extracts the features, or none to train a small network from scratch
        dask: address of a Dask scheduler whose workers compute the features, such as tcp://127.0.0.1:8786
        only_new: skip the run if the newest registered version was trained on the same images
    """
    logs.shorten_logged_errors()  # here as well, because a served flow runs in its own process
    source, folder = resolve_source(source, SOURCE, DATA_FOLDER)
    if only_new and (skipped := skip_unless_new(source, folder, name)):
        return skipped
    with flow_runs.tracked_run(MODEL_FOLDER, TRACKING_URI):
        downloaded = download_data(source, folder, return_state=True)  # wait_for= shows the dependency in Prefect's UI
        downloaded.result()
        datasets = preprocess_data(folder, batch_size, seed, backbone, dask, source, name, wait_for=[downloaded])
        train, validation, test = datasets
        model_file = train_model(train, validation, epochs, learning_rate, seed, dropout)
        evaluated = evaluate_model(model_file, test, return_state=True)
        evaluated.result()
        register_model(model_file, wait_for=[evaluated])
    return None


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, which has an option for each parameter of the flow but only_new, and a few more."""
    parser = Parser(__doc__, epilog=EXIT_STATUS)
    schema = ml_workflow.parameters.properties
    for name, parameter in inspect.signature(ml_workflow.fn).parameters.items():
        if name != "only_new":
            option, kind = f"--{name.replace('_', '-')}", parse_as(parameter.annotation)
            parser.add_argument(option, type=kind, default=parameter.default, help=schema[name].get("description"))
    parser.add_argument(
        "--require-champion",
        action="store_true",
        help=f"exit with status {NOT_PROMOTED} if the new version does not become champion",
    )
    parser.add_argument("--serve", action="store_true", help="run on demand from Prefect's UI, or on a schedule")
    parser.add_argument(
        "--cron", type=parse_as(Cron), help="with --serve: when to look for new images, as a cron expression (UTC)"
    )
    arguments = parser.parse_args()
    if arguments.cron and not arguments.serve:
        parser.error("--cron requires --serve")
    if arguments.require_champion and arguments.serve:
        parser.error("--require-champion cannot be combined with --serve")
    return arguments


def main() -> None:
    with command_line("ml_workflow.py"):
        parameters = vars(parse_arguments())
        is_served, cron, require_champion = (parameters.pop(name) for name in ("serve", "cron", "require_champion"))
        parameters["source"] = absolute_source(parameters["source"])
        if parameters["backbone"] != "none":
            backbone_weights.read_file()  # fail before starting any server
        with connect_servers(TRACKING_URI, EXPERIMENT, PREFECT_HOME, preload_keras=not is_served) as ui:
            if is_served:
                print(f"Serving ml_workflow/retrain until Ctrl-C; run or schedule it at {ui}/deployments", flush=True)
                flow_runs.serve_flow(ml_workflow, "retrain", cron=cron, parameters=parameters | {"only_new": True})
            with flow_runs.tolerate_prefect_outage():
                ml_workflow(**parameters)
            print(*describe_last_run(TRACKING_URI), sep="\n")
        if require_champion and not registry.was_promoted(last_run()):
            sys.exit(NOT_PROMOTED)


if __name__ == "__main__":
    main()
