"""From photos of apples and oranges to a registered classifier: one Prefect flow, one MLflow run.

    python ml_workflow.py
    python ml_workflow.py --source FOLDER      # your own images, one folder per class

Reading down is the same as running: download, preprocess, train, evaluate, register.
TensorFlow is imported inside the steps that use it, so that bad input is answered at once.
"""

import argparse
import inspect
import threading
from collections import Counter
from contextlib import nullcontext
from importlib.metadata import version
from multiprocessing.pool import ThreadPool  # its threads end with the run
from pathlib import Path
from typing import Any, Final, Literal, get_args
from urllib.parse import urlsplit

from workflow import image_classifier
from workflow.cli import Parser, command_line, parse_as
from workflow.data.data_issues import find_label_issues
from workflow.data.datasets import ImageDataset
from workflow.data.download import IncompleteError, UnavailableError, fetch_image, is_whole
from workflow.data.folder import check_classes, digest_files, mark_duplicates
from workflow.data.prepare import prepare_features, prepare_pixels
from workflow.data.source import are_synthetic, as_folder, check_source, is_url
from workflow.data.split import split_images
from workflow.errors import explain_os_errors
from workflow.evaluation import comparison, evidence, gate, metrics, plots, report, report_formats
from workflow.evaluation.folds import fold_by_group
from workflow.files import sha256, write_whole
from workflow.model import backbone as pretrained
from workflow.model import backbone_weights, head, novelty, small_network
from workflow.model.feature_set import FeatureSet
from workflow.model.keras_import import import_keras
from workflow.orchestration import cluster, flow_runs, logs
from workflow.orchestration.cleaning import clean
from workflow.orchestration.connection import command_for_prefect, connect_prefect, temporary_prefect_server
from workflow.orchestration.parameters import Count, Cron, Fraction, Rate, Seed
from workflow.orchestration.progress import Progress, make_artifact, show_epochs
from workflow.orchestration.recovery import CHECKPOINT, Command
from workflow.orchestration.summary import describe_last_run, describe_servers
from workflow.records import (
    MISLABELED,
    OUTLIER,
    SKIPPED,
    SPLITS,
    DataVersion,
    Evaluation,
    Evidence,
    digest_images,
)
from workflow.settings import PROJECT, settings
from workflow.signals import DeferredSignals
from workflow.text import hide_passwords, printable, to_text
from workflow.tracking import logging, registry
from workflow.tracking.connection import command_for_mlflow, connect_mlflow
from workflow.tracking.registry import CHAMPION
from workflow.tracking.run import active_run, mlflow_run

import mlflow
from filelock import FileLock
from prefect import Task, artifacts, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed, State
from prefect.tasks import exponential_backoff

# Tracking
TRACKING_URI = settings.mlflow_url  # http://127.0.0.1:5000; if no server answers there, runs go to mlflow.db
EXPERIMENT = "ml-workflow"
PREFECT_HOME = settings.state / "prefect_home"  # the history of runs that found no Prefect server

# Download
SOURCE = settings.lab_url  # the lab's folder on GitHub
FILES = [f"{fruit}s/{fruit}-{number}.jpeg" for fruit in ("apple", "orange") for number in range(1, 11)]
SAMPLES = PROJECT / "sample_images"  # stand in when the default source has no images
DATASET = settings.state / "dataset"
DATA_FOLDER = DATASET / "images"
DOWNLOADS_AT_ONCE = 4

# Preprocess
BACKBONE: Final = pretrained.NAME  # turns an image into features; with "none" a small network learns from pixels alone
SMALL_SIZE = 64  # pixels, both sides, of what the small network sees
TEST_FRACTION, VALIDATION_FRACTION = 0.1, 0.1  # of each class; at least one image
SPLIT_SALT = 11  # another value draws all images into other splits
BATCH_SIZE = 8  # images

# Train
EPOCHS = 20  # enough for a head; the small network goes on improving until about 45
LEARNING_RATE = 0.03  # at the start; it falls to 0 along a cosine
DROPOUT = 0.1  # share of the features
FILTERS = 32  # of the small network's first convolution; each following one has twice as many
SEED = 42
MODEL_FOLDER = settings.state / "models"

Backbone = Literal["efficientnet-lite0", "none"]
BACKBONES = get_args(Backbone)


def data_folder(source: str) -> Path:
    """Where the images of a source lie: a folder is used as it is, the images of a URL are kept in DATASET."""
    if not is_url(source):
        return as_folder(source)
    return DATA_FOLDER if source == SOURCE else DATASET / f"images-{sha256(source)[:8]}"


def describe_source(source: str, folder: Path) -> str:
    """Where the images in a folder come from: a URL, the folder itself, or the samples, and why."""
    if not is_url(source):
        return to_text(folder.resolve())
    if any((folder / sample.relative_to(SAMPLES)).exists() for sample in SAMPLES.glob("*/*.jpeg")):
        return f"sample_images, because {urlsplit(source).hostname} did not give the lab's photos"
    return source


def is_incomplete(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a download ended early, so that another attempt may mend it; other faults have had their retries."""
    return isinstance(state.result(raise_on_failure=False).__cause__, IncompleteError)


@task(retries=2, retry_delay_seconds=exponential_backoff(1), retry_jitter_factor=0.5, retry_condition_fn=is_incomplete)
def download_data(source: str = SOURCE, folder: Path = DATA_FOLDER, going_on: bool = False) -> None:
    """Leaves all FILES of the source in the folder, whole; what is already there is not fetched again.

    A run that was interrupted and is `going_on` keeps the images that it has. Raises WorkflowError when an image cannot
    be had. When the default source cannot be reached, or its folder is gone, SAMPLES stand in; they leave again when
    the source's own images have arrived.
    """
    logger = get_run_logger()
    if not is_url(source):
        return logger.info("%s is a folder: nothing to download", printable(to_text(folder)))
    if going_on:
        return logger.info("the run goes on with the images that it has")
    missing = [name for name in FILES if not is_whole(folder / name)]
    try:
        for name in missing[:1]:  # shows whether the host can be reached before several ask at once
            fetch_image(f"{source}/{name}", folder / name)
        with ThreadPool(DOWNLOADS_AT_ONCE) as pool:
            pool.map(lambda name: fetch_image(f"{source}/{name}", folder / name), missing[1:])
    except UnavailableError as error:
        if source != SOURCE or any((folder / name).exists() for name in FILES):
            raise
        logger.warning("The drawn images of sample_images stand in for the lab's photos: %s", error)
        for sample in SAMPLES.glob("*/*.jpeg"):
            write_whole(folder / sample.relative_to(SAMPLES), sample.read_bytes())
        return None
    for sample in SAMPLES.glob("*/*.jpeg"):
        (folder / sample.relative_to(SAMPLES)).unlink(missing_ok=True)
    return logger.info("%d images downloaded, %d already there", len(missing), len(FILES) - len(missing))


@task(cache_policy=NO_CACHE)
def preprocess_data(
    folder: Path = DATA_FOLDER,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
    backbone: Backbone = BACKBONE,
    dask: str | None = None,
    source: str | None = None,
) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """The training, validation and test datasets, of images that were verified, prepared once and split by content.

    Their inputs are the features of the backbone, or pixels (SMALL_SIZE, SMALL_SIZE, 3). What cannot be used is set
    aside with its reason. `source` is where the images were downloaded from. Raises WorkflowError when a class has too
    few usable images.
    """
    images = digest_files(folder, DATASET)
    if backbone == "none":
        prepared = prepare_pixels(mark_duplicates(images), folder, DATASET, SMALL_SIZE)
    else:
        progress = Progress("features", "Images whose features are computed", "features computed")
        prepared = prepare_features(mark_duplicates(images), folder, DATASET, cluster.workers(dask), progress)
    images = split_images(prepared.images, TEST_FRACTION, VALIDATION_FRACTION, SPLIT_SALT, prepared.duplicate_of)
    origin = describe_source(source or (SOURCE if folder == DATA_FOLDER else str(folder)), folder)
    where, drawn = to_text(folder.resolve()), are_synthetic(images, SAMPLES)
    data = DataVersion(origin, where, images, prepared.duplicate_of, prepared.issues, drawn, prepared.sessions)
    logging.log_data(data, registry.model_name(data.class_names))
    counts = Counter(image.split for image in images)
    left_out = sum(finding.kind == SKIPPED for finding in prepared.issues)
    told = ", ".join(f"{counts[name]} {name}" for name in SPLITS)
    get_run_logger().info("%s, %d set aside, %d left out", told, counts[None], left_out)
    check_classes(images)
    datasets = [ImageDataset(name, prepared.inputs, data, batch_size, seed, backbone) for name in SPLITS]
    return datasets[0], datasets[1], datasets[2]


@task(cache_policy=NO_CACHE)
def train_model(
    train: ImageDataset,
    validation: ImageDataset,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = SEED,
    dropout: float = DROPOUT,
    filters: int = FILTERS,
) -> str:
    """Train a model and return its file name; its folder is named after the MLflow run.

    The logged epochs train on the training images and validate on the validation images. With a backbone, the head is
    then refitted on both, because a model learns most from all images that the test does not need: that one is
    registered. An interrupted run resumes after its last complete epoch.
    """
    from workflow.model.checkpoint import Checkpoint

    import keras
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    parameters: dict[str, Any] = {"epochs": epochs, "batch_size": train.batch_size, "learning_rate": learning_rate}
    parameters["seed"] = seed
    refit = "no" if train.backbone == "none" else "train+validation"
    head_parameters = {"dropout": dropout, "filters": filters, "backbone": train.backbone, "refit": refit}
    mlflow.log_params(parameters | head_parameters)
    folder, classes = MODEL_FOLDER / active_run().info.run_id, len(train.class_names)
    keras.utils.set_random_seed(seed)  # after the calls of MLflow, whose retries draw from Python's generator too
    if train.backbone == "none":
        model = small_network.build_small_network(classes, SMALL_SIZE, filters, dropout, seed)
    else:
        model = head.build_head(classes, dropout, seed)
    head.compile_model(model, learning_rate, steps=epochs * len(train))
    with explain_os_errors(folder), DeferredSignals() as signals:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint(folder / CHECKPOINT, train.epoch)
        checkpoint.restore(model)
        deliver = keras.callbacks.LambdaCallback(on_train_batch_end=signals.deliver, on_test_batch_end=signals.deliver)
        callbacks = [checkpoint, show_epochs(len(checkpoint.history), epochs), deliver]
        options = {"epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": callbacks}
        model.fit(train.batches, validation_data=validation.batches, **options)
        temperature = 1.0
        if train.features is not None:
            mlflow.keras.autolog(disable=True)  # otherwise it logs the heads of cross-validation and refit as this one
            model, temperature = refit_head(train.merge(validation), folder, **parameters, dropout=dropout)
        model.save_weights(folder / "model.weights.h5")  # with a backbone, only the head's: the backbone's never change
        # An earlier process may have left a file that MLflow has under a second name: it must not be overwritten.
        (folder / "model.keras").unlink(missing_ok=True)
        if train.features is not None:
            model = head.add_backbone(model, temperature)
        model.save(folder / "model.keras")
    log_training(folder, checkpoint.history, train)
    return str(folder / "model.keras")


def refit_head(images: FeatureSet, folder: Path, dropout: float, seed: int, **parameters: Any) -> tuple[Any, float]:
    """Fit a head to all these images, and return it with the temperature that calibrates it.

    Cross-validation on the same images measures both; `folder` gets its result, cross_validation.json, and
    references.npz, by which images of other things are found. `parameters` are those of head.fit_heads().
    """
    cv_evidence = evidence.cross_validate(images, dropout=dropout, seed=seed, **parameters)
    cv_evidence.write(folder / "cross_validation.json")
    probabilities = {one.digest: one.probability for one in cv_evidence.predictions}
    held_out_in = fold_by_group(images, seed)
    novelty.write_reference_embeddings(images, held_out_in, probabilities, seed, folder / "references.npz")
    model = head.fit_head(images.features, images.labels, dropout, seed, **parameters)
    return model, cv_evidence.temperature


def log_training(folder: Path, history: list[dict[str, float]], train: ImageDataset) -> None:
    """Logs weights, curves, epochs that MLflow missed, evidence, and the model as it will be served."""
    logging.log_missing(folder.name, history)
    mlflow.log_artifact(str(folder / "model.weights.h5"), "weights")
    mlflow.log_artifact(str(plots.plot_learning_curves(history, folder / "learning_curves.png")))
    packages = ("mlflow", "tensorflow", "keras", "numpy", "pillow")
    image_size = SMALL_SIZE if train.backbone == "none" else pretrained.IMAGE_SIZE
    files, unsure_below = {"model": str(folder / "model.keras")}, None
    if cv_evidence := Evidence.find(folder / "cross_validation.json"):
        files["reference_embeddings"], unsure_below = str(folder / "reference_embeddings.npz"), cv_evidence.unsure_below
        mlflow.log_metrics(evidence.to_metrics(cv_evidence))
        for point in cv_evidence.curve:
            mlflow.log_metric("cv_learning_curve", point.accuracy, step=round(point.images_per_class))
        mlflow.log_artifact(str(folder / "cross_validation.json"))
        mlflow.set_tag("evidence", summary := metrics.describe_cross_validation(cv_evidence))
        get_run_logger().info(summary)
    logged = mlflow.pyfunc.log_model(
        name="model",
        python_model=image_classifier.__file__,
        artifacts=files,
        model_config={"class_names": train.class_names, "image_size": image_size, "unsure_below": unsure_below},
        metadata={"data_digest": train.data.digest},
        pip_requirements=[f"{name}=={version(name)}" for name in packages],
    )
    logging.share_file(folder / "model.keras", logged.model_id)


@task(cache_policy=NO_CACHE)
def evaluate_model(model_file: str, test: ImageDataset) -> None:
    """Log the test metrics, and write evaluation.json with the results of the new model and of the champion.

    The model is evaluated as it is served, by its own packaged code, on the files of the test images. The gate compares
    it with the champion on all photos, by predictions of models that were not trained on them.
    """
    mlflow.keras.autolog(log_models=False, log_datasets=False)  # which records fit(), and nothing of an evaluation
    folder = Path(model_file).parent
    model_id = logging.find_logged_model(mlflow.get_run(folder.name))
    model = registry.load_candidate(f"models:/{model_id}")
    results = registry.evaluate_candidate(model, test)
    if test.features is not None:
        results = novelty.add_nearest_neighbors(results, test.features, folder / "reference_embeddings.npz")
    cv_evidence = Evidence.find(folder / "cross_validation.json")
    issues = find_label_issues(results.predictions + (cv_evidence.predictions if cv_evidence else []))
    mislabeled = {one.file for one in issues if one.kind == MISLABELED}  # such a photo is an outlier, of course
    issues += [one for one in test.data.issues if one.kind != OUTLIER or one.file not in mislabeled]
    predictions = comparison.collect_predictions(results, cv_evidence)
    compared = registry.compare_with_champion(model, results, cv_evidence, test)
    unevaluated = cv_evidence.unevaluated if cv_evidence else []
    Evaluation(results, predictions, compared, test.data, issues, unevaluated).write(folder / "evaluation.json")
    logging.log_table(folder.name, issues, logging.ISSUE_COLUMNS, "data_issues.json")
    test_metrics = {"test_loss": results.loss, "test_accuracy": results.accuracy}
    test_metrics |= {f"test_recall_{metrics.metric_name(name)}": value for name, value in results.recall.items()}
    mlflow.log_metrics(test_metrics, run_id=folder.name, model_id=model_id)
    report.explain_mistakes(model, results, test.data, folder)
    plots.plot_confusion_matrix(results.predictions, test.class_names, folder / "confusion_matrix.png")
    files = ["evaluation.json", "confusion_matrix.png"]
    if plots.plot_misclassified_images(results.predictions, test.data, folder / "misclassified_images.png"):
        files.append("misclassified_images.png")
    for file in files:
        mlflow.log_artifact(str(folder / file), run_id=folder.name)
    get_run_logger().info(metrics.describe_test(results.predictions, predictions))


@task
def register_model(model_file: str) -> str:
    """The registered version of the evaluated model, which becomes the champion if the gate says so."""
    client, folder = mlflow.MlflowClient(), Path(model_file).parent
    run, evaluated = client.get_run(folder.name), Evaluation.read(folder / "evaluation.json")
    results, data, compared = evaluated.test, evaluated.data, evaluated.comparison
    name = registry.model_name(data.class_names)
    tags = {
        "data_digest": data.digest,
        "source": data.source,
        "synthetic": data.synthetic,
        "test_loss": results.loss,
        "test_accuracy": results.accuracy,
        "prefect_flow_run": run.data.tags.get("prefect_flow_run", "none"),
    }
    earlier = client.search_model_versions(f"run_id = '{folder.name}'")  # an earlier process may have come this far
    uri = f"models:/{logging.find_logged_model(run)}"
    number = str((earlier[0] if earlier else mlflow.register_model(uri, name, tags=tags)).version)
    decision = gate.decide(evaluated.candidate, compared, evaluated.unevaluated)
    with FileLock(folder.parent / ".gate.lock"):  # runs that end together are judged one after the other
        current = registry.champion_version(name)
        decision = gate.confirm(decision, number, compared.version if compared else None, current)
        summary = gate.describe(name, number, decision)
        client.set_model_version_tag(name, number, "gate", summary)
        if decision.promoted:
            client.set_registered_model_alias(name, CHAMPION, number)
    test_summary = metrics.describe_test(results.predictions, evaluated.candidate)
    description = report_formats.escape_markdown(summary)
    about = f"{description}.\n\n{test_summary}"
    client.update_model_version(name, number, about)
    client.set_tag(folder.name, "gate", summary)
    has_champion = decision.promoted or current
    client.set_tag(folder.name, "model_uri", f"models:/{name}{f'@{CHAMPION}' if has_champion else f'/{number}'}")
    cv_evidence = Evidence.find(folder / "cross_validation.json")
    if cv_evidence and cv_evidence.curve:
        plots.plot_evidence(cv_evidence, folder / "evidence_curves.png")
    title = gate.format_run_name(number, decision, results.accuracy, cv_evidence)
    logging.name_run(folder.name, title, f"{about}\n\n{report_formats.escape_markdown(data.describe())}")
    sections = report.build_report(
        summary.partition(": ")[0], decision, evaluated, cv_evidence, run.data.params, folder
    )
    client.log_text(folder.name, report_formats.to_html(name, sections), "report.html")
    get_run_logger().info(summary)
    text = report_formats.to_markdown(sections)
    make_artifact(artifacts.create_markdown_artifact, text, key="report", description=description)
    return number


@flow(name="ml_workflow", on_crashed=[flow_runs.mark_cancelled])
def ml_workflow(
    source: str = SOURCE,
    epochs: Count = EPOCHS,
    batch_size: Count = BATCH_SIZE,
    learning_rate: Rate = LEARNING_RATE,
    seed: Seed = SEED,
    dropout: Fraction = DROPOUT,
    backbone: Backbone = BACKBONE,
    filters: Count = FILTERS,
    dask: str | None = None,
    only_new: bool = False,
) -> State[None] | None:
    """The five steps, as one flow run with one MLflow run; or Skipped, and no MLflow run.

    Args:
        source: a folder with one folder of images per class, or a URL with the 20 files of the lab below it
        epochs: passes over the training images
        batch_size: images per training step
        learning_rate: of the optimizer at the start; it falls to 0
        seed: the same one gives the same weights
        dropout: share of the features that a training step leaves out
        backbone: the network that has seen a million photos, or none: a small network learns from your photos alone
        filters: with --backbone none, of the first convolution; each following one has twice as many
        dask: address of a Dask scheduler whose workers compute the features, such as tcp://127.0.0.1:8786
        only_new: skip all when the newest registered version has these images, whatever the other parameters
    """
    logs.shorten_logged_errors()  # a served run has a process of its own
    check_source(source)
    source = source.rstrip("/") if is_url(source) else source
    folder = data_folder(source)
    if only_new:
        download_data.fn(source, folder)  # as a plain function: there may be nothing to run
        if known := registry.describe_newest_version(digest_files(folder, DATASET)):
            return Completed(name="Skipped", message=f"nothing to train: {known} has these images")
    code = [
        Path(module).read_text() for module in (__file__, head.__file__, small_network.__file__, pretrained.__file__)
    ]
    command = Command(sha256([flow_run.parameters, *code])[:12], lambda: digest_images(digest_files(folder, DATASET)))
    with mlflow_run(MODEL_FOLDER, command) as run:
        page = logging.run_page(run, TRACKING_URI)
        about = "Metrics, parameters, report and model of this run in MLflow"
        make_artifact(artifacts.create_link_artifact, page, "The MLflow run", key="mlflow-run", description=about)
        going_on = "data_digest" in run.data.params
        # A task's state is passed to wait_for, so that Prefect draws the arrow between two tasks.
        downloaded = download_data(source, folder, going_on, return_state=True)
        downloaded.result()
        datasets = preprocess_data(folder, batch_size, seed, backbone, dask, source, wait_for=[downloaded])
        train, validation, test = datasets
        registry.check_champion(train.class_names)
        model_file = train_model(train, validation, epochs, learning_rate, seed, dropout, filters)
        evaluated = evaluate_model(model_file, test, return_state=True)
        evaluated.result()
        register_model(model_file, wait_for=[evaluated])
    return None


def parse_arguments() -> argparse.Namespace:
    """The flow's parameters from the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    texts = ml_workflow.parameters.properties
    for name, parameter in inspect.signature(ml_workflow.fn).parameters.items():
        if name != "only_new":
            option, kind = f"--{name.replace('_', '-')}", parse_as(parameter.annotation)
            parser.add_argument(option, type=kind, default=parameter.default, help=texts[name]["description"])
    parser.add_argument("--serve", action="store_true", help="run when Prefect's UI or the schedule asks, until Ctrl-C")
    parser.add_argument("--cron", type=parse_as(Cron), help="with --serve: when to look for new images (UTC)")
    parser.add_argument("--clean", action="store_true", help="only remove what no version and no unfinished run needs")
    arguments = parser.parse_args()
    if arguments.cron and not arguments.serve:
        parser.error("--cron needs --serve")
    return arguments


def main() -> None:
    with command_line("ml_workflow.py"):
        parameters = vars(parse_arguments())
        serving, cron, cleaning = (parameters.pop(name) for name in ("serve", "cron", "clean"))
        if cleaning:
            connect_mlflow(TRACKING_URI, settings.state, EXPERIMENT)
            return clean(MODEL_FOLDER, settings.state, EXPERIMENT)
        parameters["source"] = to_text(parameters["source"])  # Prefect stores it
        check_source(parameters["source"])
        if parameters["backbone"] != "none":
            backbone_weights.read_file()  # says at once what is wrong with the weights
        connect_mlflow(TRACKING_URI, settings.state, EXPERIMENT)
        has_prefect = connect_prefect()
        print(describe_servers(has_prefect), flush=True)
        if not serving:
            threading.Thread(target=import_keras).start()  # takes 3 s, while Prefect starts
        there = nullcontext(hide_passwords(get_current_settings().ui_url or ""))
        with there if has_prefect else temporary_prefect_server(PREFECT_HOME) as ui:
            if serving:
                print(f"Served as ml_workflow/retrain, form and schedule: {ui}/deployments; Ctrl-C ends it", flush=True)
                flow_runs.serve_flow(ml_workflow, "retrain", cron=cron, parameters=parameters | {"only_new": True})
            with flow_runs.tolerate_lost_prefect():
                ml_workflow(**parameters)
            later = ["" if has_prefect else command_for_prefect(PREFECT_HOME), command_for_mlflow()]
            print(*describe_last_run(MODEL_FOLDER, TRACKING_URI), *filter(None, later), sep="\n")


if __name__ == "__main__":
    main()
