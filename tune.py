"""A search for better parameters of the flow: many tracked trials, on this machine or on a Dask cluster.

    python tune.py --trials 12
    python tune.py --trials 50 --dask tcp://HOST:8786     # a running `dask scheduler` that has workers

A trial is a Prefect task and a child run of the search's one MLflow run. Trials are compared by the loss of
cross-validation over the training and validation images, never by test images: with few images accuracies tie, the
loss still tells a sure answer from a lucky one. Optuna proposes their parameters, the defaults first. With --backbone
none a trial that does worse than half of the complete ones ends early; its tag `outcome` says after how many folds, and
it cannot be the best. Repeat the command, and the same study (tune.db) goes on.
The best parameters are then trained, evaluated, registered and gated by ml_workflow(), in an ordinary run of its own.

With the backbone a trial trains heads on its features, which takes some seconds; with --backbone none it trains
small networks on pixels. Code and inputs (at most MOST_BYTES) travel with each trial: a worker elsewhere needs the same
Python packages, no images and no MLflow, and, as a Prefect task, a PREFECT_API_URL that it can reach as well.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import ml_workflow
from ml_workflow import Backbone
from workflow.cli import Parser, command_line, parse_as
from workflow.data.datasets import ImageDataset
from workflow.data.source import check_source, is_url
from workflow.errors import WorkflowError, first_line
from workflow.evaluation import cross_validation
from workflow.files import sha256
from workflow.model import backbone as pretrained
from workflow.model import backbone_weights, head
from workflow.model.keras_import import import_keras
from workflow.model.sampling import stratified_sample
from workflow.orchestration import cluster, flow_runs
from workflow.orchestration.connection import command_for_prefect, connect_prefect, temporary_prefect_server
from workflow.orchestration.logs import shorten_logged_errors
from workflow.orchestration.parameters import Count, Seed
from workflow.orchestration.progress import make_artifact
from workflow.orchestration.recovery import Command
from workflow.orchestration.summary import describe_last_run, describe_servers
from workflow.servers import check_state_database
from workflow.settings import settings
from workflow.text import to_text
from workflow.tracking.connection import command_for_mlflow, connect_mlflow
from workflow.tracking.logging import run_page
from workflow.tracking.run import active_run, last_run, mlflow_run

import cloudpickle
import distributed
import mlflow
import numpy as np
import optuna
import psutil
from distributed.security import Security
from filelock import FileLock, Timeout
from mlflow.entities import Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from prefect import artifacts, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.task_runners import TaskRunner
from prefect_dask import DaskTaskRunner
from sqlalchemy.exc import SQLAlchemyError

STUDIES = settings.state / "tune.db"  # one study for the same images, search space, seed and code
TRIALS = 12
FOLDS = 5  # fewer where a class has fewer images
MOST_BYTES = 10_000_000  # that a trial is given: the features of 1,953 images, or the pixels of 813
COMPARED = 4  # complete trials before the first may be pruned
LEAST = 1e-7  # probability, as Keras takes it in a loss
WORKER_BYTES = 10**9  # memory of a local worker
Images = tuple[np.ndarray, np.ndarray, list[str]]  # inputs, labels and groups of near-duplicates
DEFAULTS: dict[str, int | float] = {
    "epochs": ml_workflow.EPOCHS,
    "batch_size": ml_workflow.BATCH_SIZE,
    "learning_rate": ml_workflow.LEARNING_RATE,
    "dropout": ml_workflow.DROPOUT,
    "filters": ml_workflow.FILTERS,
}
SPACE: dict[str, BaseDistribution] = {
    "epochs": IntDistribution(ml_workflow.EPOCHS // 2, 2 * ml_workflow.EPOCHS),
    "batch_size": IntDistribution(ml_workflow.BATCH_SIZE // 2, 2 * ml_workflow.BATCH_SIZE, log=True),
    "learning_rate": FloatDistribution(ml_workflow.LEARNING_RATE / 4, 4 * ml_workflow.LEARNING_RATE, log=True),
    "dropout": FloatDistribution(0, 0.5),
    "filters": IntDistribution(ml_workflow.FILTERS // 2, 2 * ml_workflow.FILTERS, step=4),
}
HEAD_ONLY = [name for name in SPACE if name != "filters"]  # what there is to search for a head
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker need not have the project


@task(task_run_name="trial {number}", cache_policy=NO_CACHE)
def try_parameters(
    number: int,
    parameters: dict[str, Any],
    inputs: np.ndarray,
    labels: np.ndarray,
    groups: list[str],
    folds: int,
    seed: int,
    limits: list[float],
) -> dict[str, Any]:
    """Loss and accuracy on the images held out so far, after each fold; the last is where the loss exceeds its limit.

    Raises WorkflowError when the training diverges.
    """
    import_keras()  # a worker is a process of its own
    import keras
    import tensorflow as tf

    shorten_logged_errors()
    cross_validate = (
        cross_validation.cross_validate_small if "filters" in parameters else cross_validation.cross_validate_heads
    )
    chances, right = np.empty(0), np.empty(0)
    worker = distributed.get_worker()  # it may have many threads, but TensorFlow's random generators are the process's
    losses: list[float] = []
    accuracies: list[float] = []
    with vars(worker).setdefault("one_trial", threading.Lock()):
        keras.utils.clear_session()
        tf.config.experimental.enable_op_determinism()
        for held_out, probabilities in cross_validate(inputs, labels, groups, folds, seed, **parameters):
            chances = np.append(chances, probabilities[range(len(held_out)), labels[held_out]])
            right = np.append(right, probabilities.argmax(1) == labels[held_out])
            loss = float(-np.log(np.maximum(chances, LEAST)).mean())
            if not math.isfinite(loss):
                raise WorkflowError("the training diverges: its loss is not a number")
            losses.append(loss)
            accuracies.append(float(right.mean()))
            if loss > limits[len(losses) - 1]:
                break
    return {"val_loss": losses, "val_accuracy": accuracies, "worker": worker.address}


@contextmanager
def open_study(key: list[Any], defaults: dict[str, int | float], seed: int) -> Iterator[optuna.Study]:
    """The study of that key, with the defaults as its next trial unless they have a result, for this process alone."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = FileLock(f"{STUDIES}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise WorkflowError("another search is under way in this folder: wait for its end") from None
    try:
        name, storage = sha256(key)[:12], f"sqlite:///{STUDIES.as_posix()}"
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        for trial in study.get_trials(states=[TrialState.RUNNING]):  # of a search that died
            study.tell(trial.number, state=TrialState.FAIL)
        known = study.get_trials(states=[TrialState.COMPLETE, TrialState.WAITING])
        if not any(trial.state == TrialState.WAITING or trial.params == defaults for trial in known):
            study.enqueue_trial(defaults)
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=COMPARED, seed=seed + len(study.trials))
        yield study
    except SQLAlchemyError as error:
        raise WorkflowError(f"{STUDIES}: {first_line(error)}; mend it or delete it") from error
    finally:
        lock.release()


def limits(study: optuna.Study, folds: int) -> list[float]:
    """The loss after each fold above which a trial is hopeless: the median of the complete trials, if they suffice."""
    complete = [trial.intermediate_values for trial in study.get_trials(states=[TrialState.COMPLETE])]
    few = len(complete) < COMPARED
    return [math.inf if few or fold + 1 == folds else median(row[fold] for row in complete) for fold in range(folds)]


def search(
    study: optuna.Study,
    space: dict[str, BaseDistribution],
    trials: int,
    at_once: int,
    data: Images,
    seed: int,
) -> None:
    """Makes the trials, so many at once; each becomes a child of the active MLflow run, whatever comes of it."""
    _, labels, groups = data
    first_of_groups = np.unique(groups, return_index=True)[1]
    folds = max(2, min(FOLDS, *np.bincount(labels[first_of_groups], minlength=labels.max() + 1)))
    running: dict[PrefectFuture[dict[str, Any]], tuple[optuna.Trial, str]] = {}
    total, done, start = trials, 0, time.monotonic()
    try:
        while trials or running:
            while trials and len(running) < at_once:
                trial, trials = study.ask(space), trials - 1
                child = start_child(trial)
                stop = limits(study, folds) if "filters" in space else [math.inf] * folds  # heads are trained at once
                future = try_parameters.submit(trial.number, trial.params, *data, folds, seed, stop)
                running[future] = trial, child
            future = next(as_completed(list(running)))
            end_trial(study, *running[future], future, folds)
            del running[future]
            done += 1
            left = (time.monotonic() - start) / done * (total - done)
            get_run_logger().info("%d of %d trials are over, about %.0f s left", done, total, left)
    finally:
        for trial, child in running.values():
            told = study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)  # it may have been told a moment ago
            mlflow.MlflowClient().set_terminated(child, "KILLED" if told.state == TrialState.FAIL else "FINISHED")


def start_child(trial: optuna.Trial) -> str:
    """The id of a new child of the active MLflow run, with the trial's parameters."""
    client, parent = mlflow.MlflowClient(), active_run()
    tags = {
        MLFLOW_PARENT_RUN_ID: parent.info.run_id,
        MLFLOW_RUN_NAME: f"trial {trial.number}",
        "prefect_flow_run": flow_run.id,  # by which recover() finds and closes it when this process dies
    }
    child = client.create_run(parent.info.experiment_id, tags=tags).info.run_id
    client.log_batch(child, params=[Param(name, str(value)) for name, value in trial.params.items()])
    return child


def end_trial(
    study: optuna.Study, trial: optuna.Trial, child: str, future: PrefectFuture[dict[str, Any]], folds: int
) -> None:
    """Tells Optuna and MLflow what came of a trial: complete, pruned or failed."""
    client = mlflow.MlflowClient()
    try:
        results = future.result()
    except Exception as error:  # also distributed's KilledWorker: its workers died one after the other
        outcome = f"failed: {first_line(error)}"
        study.tell(trial, state=TrialState.FAIL)
    else:
        outcome = "complete"
        for fold, loss in enumerate(results["val_loss"]):
            trial.report(loss, fold)
            client.log_metric(child, "loss_so_far", loss, step=fold)
            client.log_metric(child, "accuracy_so_far", results["val_accuracy"][fold], step=fold)
        client.set_tag(child, "worker", results["worker"])
        trial.set_user_attr("val_accuracy", results["val_accuracy"][-1])
        if len(results["val_loss"]) < folds:
            outcome = f"pruned after {len(results['val_loss'])} of {folds} folds"
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, results["val_loss"][-1])
            for metric in ("val_loss", "val_accuracy"):  # of complete trials alone, so that they can be ranked by it
                client.log_metric(child, metric, results[metric][-1])
        outcome += f", val_loss {results['val_loss'][-1]:.4f}, val_accuracy {results['val_accuracy'][-1]:.4f}"
    client.set_tag(child, "outcome", outcome)
    client.set_terminated(child, "FAILED" if outcome.startswith("failed") else "FINISHED")
    parameters = ", ".join(f"{name} {value:.3g}" for name, value in trial.params.items())
    get_run_logger().info("trial %d: %s; %s", trial.number, outcome, parameters)


@flow(name="tune", on_crashed=[flow_runs.mark_cancelled])
def tune(source: str, trials: Count, seed: Seed, backbone: Backbone, dask: str | None, at_once: Count) -> None:
    """So many more trials, as child runs of one MLflow run, which has the best parameters in its tag `best`."""
    from tune import keep_search  # here: Prefect sends the flow with each trial, and this would go with it

    keep_search(source, trials, seed, backbone, dask, at_once)


def keep_search(source: str, trials: int, seed: int, backbone: Backbone, dask: str | None, at_once: int) -> None:
    """The flow's search, in its one MLflow run."""
    source = source.rstrip("/") if is_url(source) else source
    folder = ml_workflow.data_folder(source)
    command = Command(flow_run.id, lambda: "")  # of this flow run alone: Optuna's study is what a search goes on with
    with mlflow_run(ml_workflow.MODEL_FOLDER, command, "tune "):
        downloaded = ml_workflow.download_data(source, folder, return_state=True)
        downloaded.result()
        train, validation, _ = ml_workflow.preprocess_data(
            folder, seed=seed, backbone=backbone, dask=dask, source=source, wait_for=[downloaded]
        )
        data = draw_images(train, validation, seed)
        names = SPACE if backbone == "none" else HEAD_ONLY
        space, defaults = {name: SPACE[name] for name in names}, {name: DEFAULTS[name] for name in names}
        code = [Path(file).read_text() for file in (pretrained.__file__, cross_validation.__file__, head.__file__)]
        key = [train.data.digest, repr(space), defaults, seed, FOLDS, *data[0].shape, *code]
        with open_study(key, defaults, seed) as study:
            search(study, space, trials, at_once, data, seed)
            conclude(study, defaults)


def draw_images(train: ImageDataset, validation: ImageDataset, seed: int) -> Images:
    """The inputs, labels and groups of as many images of both datasets as MOST_BYTES hold, of each class its share."""
    labels = np.concatenate([train.labels, validation.labels])
    most = MOST_BYTES // train.read_inputs(np.arange(1)).nbytes
    chosen = np.flatnonzero(stratified_sample(labels, most, np.random.default_rng(seed)))
    of_train = chosen < len(train.labels)
    inputs = [train.read_inputs(chosen[of_train])]
    if not of_train.all():
        inputs.append(validation.read_inputs(chosen[~of_train] - len(train.labels)))
    groups = np.array(train.groups + validation.groups)[chosen].tolist()
    return np.concatenate(inputs), labels[chosen], groups


def loss_of(trial: optuna.trial.FrozenTrial) -> float:
    """The loss of a complete trial; others have none, which is worse than any."""
    return math.inf if trial.value is None else trial.value


def conclude(study: optuna.Study, defaults: dict[str, int | float]) -> None:
    """Leaves the study's best parameters, and how much better than the defaults they are, in the active MLflow run."""
    complete = sorted(study.get_trials(states=[TrialState.COMPLETE]), key=loss_of)
    if not complete:
        raise WorkflowError("no trial succeeded: the log and the child runs say why")
    told = [
        f"{name} have val_loss {loss_of(trial):.4f}, val_accuracy {trial.user_attrs['val_accuracy']:.4f}"
        for name, trials in (
            (f"Of {len(study.trials)} trials the parameters of trial {complete[0].number}", complete),
            ("the defaults", [trial for trial in complete if trial.params == defaults]),
        )
        for trial in trials[:1]
    ]
    mlflow.set_tags({"best": json.dumps(complete[0].params), "result": "; ".join(told)})
    mlflow.log_metric("val_loss", loss_of(complete[0]))
    losses = {trial.number: trial.value for trial in complete}
    rows = [
        {"trial": trial.number, "outcome": trial.state.name.lower(), "val_loss": losses.get(trial.number)}
        | trial.params
        for trial in study.trials
    ]
    make_artifact(artifacts.create_table_artifact, rows, key="trials", description=told[0])


@contextmanager
def workers(address: str | None, trials: int) -> Iterator[distributed.Client]:
    """A client of the Dask cluster at the address, or of one with as many local processes as pay, while it lasts."""
    if address:
        with cluster.connect(address) as client:
            yield client
        return
    memory = psutil.virtual_memory().available // WORKER_BYTES
    count = max(1, min(os.cpu_count(), memory, trials))
    security = Security.temporary()  # a key of this search alone: else any user of this machine could send code
    options = {"n_workers": count, "threads_per_worker": 1, "memory_limit": None, "dashboard_address": None}
    with (
        distributed.LocalCluster(security=security, **options) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        yield client


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=ml_workflow.SOURCE, help="as for ml_workflow.py")
    parser.add_argument("--trials", type=parse_as(Count), default=TRIALS, help="to add to the study")
    parser.add_argument("--seed", type=parse_as(Seed), default=ml_workflow.SEED, help="of the trials and the final run")
    parser.add_argument(
        "--backbone",
        choices=ml_workflow.BACKBONES,
        default=ml_workflow.BACKBONE,
        help="none: search parameters of the small network",
    )
    parser.add_argument("--dask", metavar="ADDRESS", help="of a running Dask scheduler, such as tcp://127.0.0.1:8786")
    return parser.parse_args()


def main() -> None:
    with command_line("tune.py"):
        arguments = parse_arguments()
        source, seed, trials = to_text(arguments.source), arguments.seed, arguments.trials
        backbone, dask = arguments.backbone, arguments.dask
        check_source(source)
        if backbone != "none":
            backbone_weights.read_file()  # says at once what is wrong with the weights
        check_state_database(STUDIES)
        connect_mlflow(ml_workflow.TRACKING_URI, settings.state, ml_workflow.EXPERIMENT)
        has_prefect = connect_prefect()
        print(describe_servers(has_prefect))
        what = "heads on features" if backbone != "none" else "small networks on pixels"
        print(f"{trials} trials, each a cross-validation of {what}; first the workers start, about 15 s", flush=True)
        threading.Thread(target=import_keras).start()  # takes 3 s, while Prefect and Dask start
        with nullcontext() if has_prefect else temporary_prefect_server(ml_workflow.PREFECT_HOME):
            with workers(dask, trials) as client, flow_runs.tolerate_lost_prefect():
                scheduler = client.scheduler_info(n_workers=-1)
                # The key of a local cluster is that of its client; a cluster elsewhere has Dask's own configuration.
                key = None if dask else {"security": client.security}
                runner: TaskRunner[Any] = DaskTaskRunner(address=scheduler["address"], client_kwargs=key)
                tune.with_options(task_runner=runner)(source, trials, seed, backbone, dask, len(scheduler["workers"]))
            parent = last_run()
            with flow_runs.tolerate_lost_prefect():
                best = json.loads(parent.data.tags["best"])
                ml_workflow.ml_workflow(source=source, seed=seed, backbone=backbone, **best)
            search_page = f"The search: {run_page(parent, ml_workflow.TRACKING_URI)}"
            later = "" if has_prefect else command_for_prefect(ml_workflow.PREFECT_HOME)
            result = describe_last_run(ml_workflow.MODEL_FOLDER, ml_workflow.TRACKING_URI)
            lines = [parent.data.tags["result"], search_page, *result, later, command_for_mlflow()]
            print(*filter(None, lines), sep="\n")


if __name__ == "__mp_main__":  # a local worker: Ctrl-C is for the search, which ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)

if __name__ == "__main__":
    main()
