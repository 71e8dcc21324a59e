"""From photos of apples and oranges to a registered classifier: one Prefect flow, one MLflow run.

    python ml_workflow.py
    python ml_workflow.py --source FOLDER      # your own images, one folder per class

Reading down is the same as running: download, preprocess, train, evaluate, register.
TensorFlow is imported inside the steps that use it, so that bad input is answered at once.
"""

import argparse
import inspect
import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from multiprocessing.pool import ThreadPool  # its threads end with the run
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from workflow.errors import WorkflowError
from workflow.images import folder_check, image_folder, near_duplicates
from workflow.judging import evaluation, evidence, gate, report
from workflow.model import backbone as pretrained
from workflow.model import features, image_classifier, network, references
from workflow.model.image_classifier import is_url
from workflow.running import runs, tracking

import mlflow
import numpy as np
import requests
from filelock import FileLock
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException
from prefect import artifacts, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.schedules import CronSchedule
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed, State
from prefect.tasks import exponential_backoff
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

PROJECT = Path(__file__).resolve().parent

# Tracking
TRACKING_URI = "http://127.0.0.1:5000"  # an MLflow server there is used; without one, mlflow.db in this folder is
EXPERIMENT = "ml-workflow"
CHAMPION = "champion"  # the alias of the registered version to use
PREFECT_HOME = PROJECT / "prefect_home"  # the history of runs that found no Prefect server

# Download
SOURCE = "https://raw.githubusercontent.com/HOGENT-MLOps/mlops-labs/main/resources/02-ml-workflow/img-lab2"
FILES = [f"{fruit}s/{fruit}-{number}.jpeg" for fruit in ("apple", "orange") for number in range(1, 11)]
SAMPLES = PROJECT / "sample_images"  # stand in when the default source cannot be reached
DATASET = PROJECT / "dataset"
DATA_FOLDER = DATASET / "images"
DOWNLOADS_AT_ONCE = 4

# Preprocess
BACKBONE = pretrained.NAME  # what turns an image into features; "none": a small network learns from pixels alone
SMALL_SIZE = 64  # pixels, both sides, of what the small network sees
TEST_SHARE, VALIDATION_SHARE = 0.1, 0.1  # of each class; one image each at least, two test images of ten or more
SPLIT_SALT = 11  # with another one all images are drawn into other splits
BATCH_SIZE = 8  # images

# Train
EPOCHS = 20  # enough for a head on a backbone's features; the small network gains by 45
LEARNING_RATE = 0.03  # at the start; it falls to 0 along a cosine
DROPOUT = 0.1  # share of the features
FILTERS = 32  # of the small network's first convolution; each next has twice as many
SEED = 42
MODEL_FOLDER = PROJECT / "models"

SPLITS = ("train", "validation", "test")
Count = Annotated[int, Field(gt=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Backbone = Literal["efficientnet-lite0", "none"]
BACKBONES = get_args(Backbone)
Cron = Annotated[str, AfterValidator(CronSchedule.valid_cron_string)]


def data_folder(source: str) -> Path:
    """Where a source's images lie: a folder is used as it is, a URL's images are kept in DATASET."""
    if not is_url(source):
        return Path(source)
    return DATA_FOLDER if source == SOURCE else DATASET / f"images-{image_folder.sha256(source)[:8]}"


def ended_early(task, task_run, state) -> bool:
    """Whether a download may be mended by another attempt; the other faults have had their retries."""
    return isinstance(state.result(raise_on_failure=False).__cause__, image_classifier.IncompleteError)


@task(retries=2, retry_delay_seconds=exponential_backoff(1), retry_jitter_factor=0.5, retry_condition_fn=ended_early)
def download_data(source: str = SOURCE, folder: Path = DATA_FOLDER) -> None:
    """Leaves all FILES of the source in the folder, whole; what is already there is not fetched again.

    Raises WorkflowError when one cannot be had. When the default source cannot be reached at all,
    SAMPLES stand in; they leave again when the source's own images have arrived.
    """
    logger = get_run_logger()
    if not is_url(source):
        return logger.info("%s is a folder: nothing to download", folder)
    if (run := mlflow.active_run()) and "data_digest" in run.data.params:
        return logger.info("the run goes on with the images that it has")
    missing = [name for name in FILES if not image_classifier.is_whole(folder / name)]
    try:
        for name in missing[:1]:  # shows whether the host can be reached before several ask at once
            fetch_file(f"{source}/{name}", folder / name)
        with ThreadPool(DOWNLOADS_AT_ONCE) as pool:
            pool.map(lambda name: fetch_file(f"{source}/{name}", folder / name), missing[1:])
    except requests.ConnectionError as error:
        if source != SOURCE or any((folder / name).exists() for name in FILES):
            raise WorkflowError(f"{source} cannot be reached: check the network, or use --source FOLDER") from error
        host = urlsplit(source).hostname
        logger.warning("%s cannot be reached: the drawn images of sample_images stand in for the photos", host)
        for sample in SAMPLES.glob("*/*.jpeg"):
            image_folder.write_whole(folder / sample.relative_to(SAMPLES), sample.read_bytes())
        told = f"sample_images, because {host} could not be reached"
        return image_folder.write_whole(folder / ".source", told.encode())
    for sample in SAMPLES.glob("*/*.jpeg"):
        (folder / sample.relative_to(SAMPLES)).unlink(missing_ok=True)
    image_folder.write_whole(folder / ".source", source.encode())
    logger.info("%d images downloaded, %d already there", len(missing), len(FILES) - len(missing))


def fetch_file(url: str, path: Path) -> None:
    """Writes the image at a URL to a file; raises WorkflowError, or requests.ConnectionError without a host."""
    try:
        body = image_classifier.fetch(url)
        image_classifier.read_image(body, SMALL_SIZE)
    except ValueError as error:
        raise WorkflowError(f"{url}: {error}") from error
    image_folder.write_whole(path, body)


@task(cache_policy=NO_CACHE)
def preprocess_data(
    folder: Path = DATA_FOLDER,
    batch_size: int = BATCH_SIZE,
    seed: int = SEED,
    backbone: Backbone = BACKBONE,
    dask: str | None = None,
) -> tuple:
    """The training, validation and test datasets, of images that were verified, prepared once and split by content.

    Each gives (inputs, labels): the backbone's features, float32 of shape (batch, 1280), or without a backbone pixels,
    uint8 of shape (batch, SMALL_SIZE, SMALL_SIZE, 3); and int32 of shape (batch,). It carries class_names, file_names,
    batch_size, backbone and data. What cannot be used is set aside with its reason. Raises WorkflowError when a class
    has too few usable images.
    """
    digest, images = image_folder.digest_files(folder, DATASET)
    leaders, findings = {}, []
    if backbone == "none":
        images, inputs = image_folder.load_shrunk(images, folder, DATASET, SMALL_SIZE)
    else:
        progress = tracking.Progress("features", "photos described by the backbone")
        images, described = features.load_features(images, folder, DATASET, dask, progress)
        inputs = {name: one.features for name, one in described.items()}
        leaders, pairs = near_duplicates.group_images(images, described)
        findings = folder_check.check_folder(images, inputs, pairs, folder)
    images = image_folder.split_images(images, TEST_SHARE, VALIDATION_SHARE, SPLIT_SALT, leaders)
    marker = folder / ".source"
    source = marker.read_text(encoding="utf-8") if marker.exists() else str(folder.resolve())
    data = {"digest": digest, "source": source, "folder": str(folder.resolve()), "images": images}
    data |= {"findings": findings, "leaders": leaders}
    log_data(data)
    image_folder.check_classes(images)
    datasets = tuple(image_folder.load_split(split, inputs, data, batch_size, seed) for split in SPLITS)
    for dataset in datasets:
        dataset.backbone = backbone
    return datasets


def log_data(data: dict) -> None:
    """Logs the data set's version, its source and the fate of every file to the MLflow run."""
    mlflow.log_param("data_digest", data["digest"])
    mlflow.set_tag("source", data["source"])
    name = gate.model_name(sorted({image["class"] for image in data["images"]}))
    # the source is only shown, so that a folder can stand where a URL is meant
    dataset = MetaDataset(HTTPDatasetSource(data["source"]), name=name, digest=data["digest"][:12])
    try:
        mlflow.log_input(dataset, context="training")
    except MlflowException:  # another run made the same entry at the same moment; now it is there
        mlflow.log_input(dataset, context="training")
    columns = ("file", "class", "split", "reason", "digest")
    runs.log_table(mlflow.active_run().info.run_id, data["images"], columns, "images.json")
    counts = Counter(image["split"] for image in data["images"])
    get_run_logger().info("%s, %d set aside", ", ".join(f"{counts[name]} {name}" for name in SPLITS), counts[None])


@task(cache_policy=NO_CACHE)
def train_model(
    train,
    validation,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = SEED,
    dropout: float = DROPOUT,
    filters: int = FILTERS,
) -> str:
    """The file name of the model trained on the datasets; its folder is named after the MLflow run.

    Goes on where an earlier process of the same run was interrupted, to the same weights.
    """
    from workflow.model.backup import Backup

    import keras
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()
    mlflow.keras.autolog(log_models=False, log_datasets=False)
    parameters = {"epochs": epochs, "batch_size": train.batch_size, "learning_rate": learning_rate, "seed": seed}
    mlflow.log_params(parameters | {"dropout": dropout, "filters": filters, "backbone": train.backbone})
    folder = MODEL_FOLDER / mlflow.active_run().info.run_id
    keras.utils.set_random_seed(seed)  # here: what tries MLflow again above also draws from Python's generator
    model = network.build(train, dropout, filters, seed)
    network.compile_model(model, learning_rate, steps=epochs * len(train))
    with tracking.writing(folder), tracking.deferred_signals() as deliver:
        folder.mkdir(parents=True, exist_ok=True)
        backup = Backup(folder / runs.BACKUP, train.epoch)
        backup.restore(model)
        deliver_signals = keras.callbacks.LambdaCallback(on_train_batch_end=deliver, on_test_batch_end=deliver)
        callbacks = [backup, log_epochs(len(backup.history), epochs), deliver_signals]
        model.fit(train, validation_data=validation, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
        model.save_weights(folder / "model.weights.h5")  # of a head alone: a backbone's weights never change
        temperature = 1.0
        if train.backbone != "none":
            temperature = cross_validate(folder, train, validation, parameters | {"dropout": dropout})
        (folder / "model.keras").unlink(missing_ok=True)  # of an earlier process: MLflow may have it under this name
        network.on_pixels(model, train.backbone, temperature).save(folder / "model.keras")
    log_training(folder, backup.history, train)
    return str(folder / "model.keras")


def cross_validate(folder: Path, train, validation, parameters: dict) -> float:
    """The temperature that makes the model's probabilities true; leaves cross_validation.json and references.npz."""
    mlflow.keras.autolog(disable=True)  # it would log the heads of the folds as if they were the model
    both = [np.concatenate([getattr(one, name) for one in (train, validation)]) for name in ("features", "labels")]
    files, leaders = train.file_names + validation.file_names, train.data["leaders"]
    digests = {image["file"]: image["digest"] for image in train.data["images"]}
    groups = [leaders.get(digests[file], digests[file]) for file in files]
    found = evidence.assess(*both, groups, train.class_names, files, **parameters)
    image_folder.write_whole(folder / "cross_validation.json", json.dumps(found).encode())
    labels, files, seed = train.labels, train.file_names, parameters["seed"]
    references.remember(train.features, labels, files, seed, folder / "references.npz")
    return found["temperature"]


def log_epochs(done: int, epochs: int):
    """A Keras callback: for each epoch a line in the log and a step of the progress bar in the Prefect UI."""
    from keras.callbacks import LambdaCallback

    logger = get_run_logger()
    if done:
        logger.info("going on after epoch %d of %d", done, epochs)
    progress = tracking.Progress("training")
    progress(done, epochs)

    def end_epoch(epoch, logs):
        logger.info("epoch %d of %d: %s", epoch + 1, epochs, ", ".join(f"{name} {logs[name]:.4f}" for name in logs))
        progress(epoch + 1, epochs)

    return LambdaCallback(on_epoch_end=end_epoch)


def log_training(folder: Path, history: list[dict], train) -> None:
    """Logs weights, curves, epochs that MLflow missed, and the model as it will be served."""
    runs.log_missing(folder.name, history)
    mlflow.log_artifact(folder / "model.weights.h5", "weights")
    mlflow.log_artifact(report.learning_curves(history, folder / "learning_curves.png"))
    packages = ("mlflow", "tensorflow", "keras", "numpy", "pillow")
    image_size = SMALL_SIZE if train.backbone == "none" else pretrained.IMAGE_SIZE
    files = {"model": folder / "model.keras"}
    if train.backbone != "none":
        files["references"] = folder / "references.npz"
        log_evidence(folder)
    logged = mlflow.pyfunc.log_model(
        name="model",
        python_model=image_classifier.__file__,
        artifacts={name: str(path) for name, path in files.items()},
        model_config={"class_names": train.class_names, "image_size": image_size},
        metadata={"data_digest": train.data["digest"]},
        pip_requirements=[f"{name}=={version(name)}" for name in packages],
    )
    runs.share_file(folder / "model.keras", logged)


def log_evidence(folder: Path) -> None:
    """Logs what cross-validation has found: metrics, the learning curve by images per class, and a sentence."""
    found = read_evidence(folder)
    low, high = evaluation.interval(evaluation.count_right(found["images"]), len(found["images"]))
    metrics = {name: found[name] for name in ("cv_accuracy", "cv_loss", "temperature")}
    metrics |= {"cv_accuracy_low": low, "cv_accuracy_high": high}
    metrics |= {f"cv_recall_{gate.plain(name)}": share for name, share in found["recall"].items()}
    for when, result in found["calibration"].items():
        metrics[f"cv_calibration_error_{when}"] = result["expected_calibration_error"]
    mlflow.log_metrics(metrics)
    for point in found["curve"]:
        mlflow.log_metric("cv_learning_curve", point["accuracy"], step=round(point["images_per_class"]))
    mlflow.log_artifact(folder / "cross_validation.json")
    mlflow.set_tag("evidence", told := evaluation.cross_validated(found["images"]))
    get_run_logger().info(told)


@task(cache_policy=NO_CACHE)
def evaluate_model(model_file: str, test) -> None:
    """Leaves the test metrics in the run, and evaluation.json, with the champion's results too, beside the model.

    Both models are judged as they are served, by their own packaged code, on the files of the test images.
    """
    mlflow.keras.autolog(log_models=False, log_datasets=False)  # of fit alone: MLflow logs nothing of an evaluation
    folder = Path(model_file).parent
    model_id = runs.logged_model(mlflow.get_run(folder.name))
    results = gate.judge_candidate(f"models:/{model_id}", test)
    results |= {"class_names": test.class_names, "data": test.data, "champion": gate.judge_champion(test, CHAMPION)}
    if test.features is not None:
        neighbours = references.nearest(test.features, folder / "references.npz", count=3)
        results["images"] = [
            row | {"neighbours": some} for row, some in zip(results["images"], neighbours, strict=True)
        ]
    doubtful = results["images"] + (read_evidence(folder) or {"images": []})["images"]
    results["findings"] = folder_check.find_wrong_labels(doubtful) + test.data["findings"]
    image_folder.write_whole(folder / "evaluation.json", json.dumps(results).encode())
    runs.log_table(folder.name, results["findings"], ("finding", "file", "class", "detail"), "findings.json")

    metrics = {name: results[name] for name in ("test_loss", "test_accuracy")}
    metrics |= {f"test_recall_{gate.plain(name)}": recall for name, recall in results["recall"].items()}
    mlflow.log_metrics(metrics, run_id=folder.name, model_id=model_id)
    report.confusion_matrix(results, folder / "confusion_matrix.png")
    report.misjudged_images(results, folder / "misjudged_images.png")
    for name in ("evaluation.json", "confusion_matrix.png", "misjudged_images.png"):
        mlflow.log_artifact(folder / name, run_id=folder.name)
    get_run_logger().info(evaluation.evidence(results["images"]))


def read_evidence(folder: Path) -> dict | None:
    """What cross-validation has found; None with the small network."""
    path = folder / "cross_validation.json"
    return json.loads(path.read_text()) if path.exists() else None


@task
def register_model(model_file: str) -> str:
    """The registered version of the evaluated model, which becomes the champion if gate.verdict() says so."""
    client, folder = mlflow.MlflowClient(), Path(model_file).parent
    run = client.get_run(folder.name)
    results = json.loads((folder / "evaluation.json").read_text())
    name = gate.model_name(results["class_names"])
    tags = {
        "data_digest": results["data"]["digest"],
        "source": results["data"]["source"],
        "test_loss": results["test_loss"],
        "test_accuracy": results["test_accuracy"],
        "prefect_flow_run": run.data.tags.get("prefect_flow_run", "none"),
    }
    known = client.search_model_versions(f"run_id = '{folder.name}'")  # an earlier process may have come this far
    registered = known[0] if known else mlflow.register_model(f"models:/{runs.logged_model(run)}", name, tags=tags)
    version = registered.version
    with FileLock(folder.parent / ".gate.lock"):  # runs that end together are judged one after the other
        decision = gate.verdict(name, version, results, CHAMPION)
        client.set_model_version_tag(name, version, "gate", decision)
        if decision.startswith(f"{name} version {version} is the champion"):
            client.set_registered_model_alias(name, CHAMPION, version)
    client.update_model_version(name, version, f"{decision}.\n\n{evaluation.evidence(results['images'])}")
    client.set_tag(folder.name, "gate", decision)
    if assessed := read_evidence(folder):
        report.evidence_curves(assessed, folder / "evidence_curves.png")
    sections = report.build(results, assessed, run.data.params, decision, folder)
    client.log_text(folder.name, report.as_html(name, sections), "report.html")
    get_run_logger().info(decision)
    text = report.as_markdown(sections)
    tracking.show(artifacts.create_markdown_artifact, text, key="report", description=decision)
    return str(version)


@flow(name="ml_workflow", on_crashed=[runs.cancel])
def ml_workflow(
    source: str = SOURCE,
    epochs: Count = EPOCHS,
    batch_size: Count = BATCH_SIZE,
    learning_rate: Rate = LEARNING_RATE,
    seed: Seed = SEED,
    dropout: Share = DROPOUT,
    backbone: Backbone = BACKBONE,
    filters: Count = FILTERS,
    dask: str | None = None,
    only_new: bool = False,
) -> State | None:
    """The five steps, as one flow run with one MLflow run; or Skipped, and no MLflow run.

    Args:
        source: a folder with one folder of images per class, or a URL of the same 20 files
        epochs: passes over the training images
        batch_size: images per training step
        learning_rate: of the optimizer at the start; it falls to 0
        seed: the same one gives the same weights
        dropout: share of the features that a training step leaves out
        backbone: the network that has seen a million photos, or none: a small network learns from your photos alone
        filters: with --backbone none, of the first convolution; each next has twice as many
        dask: address of a Dask scheduler whose workers compute the features, such as tcp://127.0.0.1:8786
        only_new: skip all when the newest registered version has these images, whatever the other parameters
    """
    tracking.one_line_errors()  # a served run has a process of its own
    source = source.rstrip("/") if is_url(source) else source
    folder, url = data_folder(source), flow_run.ui_url
    if only_new:
        download_data.fn(source, folder)  # a task once there is an MLflow run
        if known := gate.newest_version(*image_folder.digest_files(folder, DATASET)):
            return Completed(name="Skipped", message=f"nothing to train: {known} has these images")
    texts = [Path(file).read_text() for file in (__file__, network.__file__, pretrained.__file__)]
    command_digest = image_folder.sha256([flow_run.parameters, *texts])[:12]
    tags = {"prefect_flow_run": flow_run.id, "prefect_url": url, "command_digest": command_digest}
    text = f"Prefect flow run: [{flow_run.name}]({url})"

    def digest() -> str:
        return image_folder.digest_files(folder, DATASET)[0]

    with runs.mlflow_run(MODEL_FOLDER, flow_run.name, tags, text, digest) as run:
        page = tracking.run_url(run, TRACKING_URI)
        tracking.show(artifacts.create_link_artifact, page, "The MLflow run", key="mlflow-run")
        downloaded = download_data(source, folder, return_state=True)
        downloaded.result()
        train, validation, test = preprocess_data(folder, batch_size, seed, backbone, dask, wait_for=[downloaded])
        model_file = train_model(train, validation, epochs, learning_rate, seed, dropout, filters)
        evaluated = evaluate_model(model_file, test, return_state=True)
        evaluated.result()
        register_model(model_file, wait_for=[evaluated])


def summary() -> str:
    """What came of the last run, and where to look at it."""
    run = mlflow.last_active_run()
    tags = run.data.tags
    return "\n".join(
        [
            *filter(None, [tags.get("evidence")]),
            tags["gate"],
            f"Images: {tags['source']}",
            f"Prefect: {tags['prefect_url']}",
            f"MLflow: {tracking.run_url(run, TRACKING_URI)}",
        ]
    )


def legal(kind) -> Callable[[str], object]:
    """For argparse: the value of an option, held to a type of the flow's parameters."""

    def parse(text: str):
        try:
            return TypeAdapter(kind).validate_strings(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error.errors()[0]['msg'].lower()}") from None

    return parse


def parse_arguments() -> argparse.Namespace:
    """The flow's parameters from the command line."""
    parser = tracking.Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    texts = ml_workflow.parameters.properties
    for name, parameter in inspect.signature(ml_workflow.fn).parameters.items():
        if name != "only_new":
            option, kind, text = f"--{name.replace('_', '-')}", legal(parameter.annotation), texts[name]["description"]
            parser.add_argument(option, type=kind, default=parameter.default, help=text)
    parser.add_argument("--serve", action="store_true", help="run when Prefect's UI or the schedule asks, until Ctrl-C")
    parser.add_argument("--cron", type=legal(Cron), help="with --serve: when to look for new images (UTC)")
    arguments = parser.parse_args()
    if arguments.cron and not arguments.serve:
        parser.error("--cron needs --serve")
    return arguments


def main() -> None:
    with tracking.command_line("ml_workflow.py"):
        parameters = vars(parse_arguments())
        serving, cron = parameters.pop("serve"), parameters.pop("cron")
        if not is_url(parameters["source"]):
            image_folder.list_images(Path(parameters["source"]))
        if parameters["backbone"] != "none":
            pretrained.read_file()  # says at once what is wrong with the weights
        start_mlflow = tracking.connect_mlflow(TRACKING_URI, PROJECT, EXPERIMENT)
        start_prefect = tracking.connect_prefect(PREFECT_HOME)
        if not serving:
            threading.Thread(target=tracking.import_keras).start()  # 3 s, while Prefect starts
        known = nullcontext(get_current_settings().ui_url)
        with tracking.temporary_server(PREFECT_HOME) if start_prefect else known as ui:
            if serving:
                print(f"Served as ml_workflow/retrain, form and schedule: {ui}/deployments; Ctrl-C ends it", flush=True)
                tracking.serve(ml_workflow, "retrain", cron=cron, parameters=parameters | {"only_new": True})
            with runs.ending_without_prefect():
                ml_workflow(**parameters)
            print(summary(), *filter(None, [start_prefect, start_mlflow]), sep="\n")


if __name__ == "__main__":
    main()
