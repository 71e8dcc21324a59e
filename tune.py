"""Search for better parameters of the head, on this machine or on a Dask cluster.

    python tune.py --trials 12
    python tune.py --trials 50 --dask tcp://HOST:8786     # a running `dask scheduler` with workers

Each trial is a Prefect task and a child run of the search's MLflow run. It cross-validates a head on the training and
validation images, never on test images. Optuna minimizes the loss, because with few images many trials have the same
accuracy, and tries the defaults first. Repeat the command to continue the same study (tune.db). The search ends with an
ordinary run of ml_workflow() with the best parameters.

Code and features are sent to the worker with each trial. A remote worker needs the same Python packages and a
PREFECT_API_URL that it can reach, but neither the images nor an MLflow server.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves this folder out

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_workflow
from ml_workflow import BATCH_SIZE, DROPOUT, EPOCHS, LEARNING_RATE
from workflow.cli import Parser, command_line, parse_as
from workflow.data.datasets import ImageDataset
from workflow.data.features import features_key
from workflow.data.source import check_source, is_url, resolve_source
from workflow.errors import WorkflowError, first_line
from workflow.evaluation.evidence import predict_held_out
from workflow.evaluation.folds import Folds, assign_folds
from workflow.evaluation.metrics import cross_entropy
from workflow.files import acquire_lock, sha256
from workflow.model import backbone_weights, head
from workflow.model.keras_import import import_keras
from workflow.model.sampling import stratified_sample
from workflow.orchestration import cluster
from workflow.orchestration.connection import connect_servers
from workflow.orchestration.flow_runs import mark_cancelled, tolerate_prefect_outage, tracked_run
from workflow.orchestration.logs import shorten_logged_errors
from workflow.orchestration.parameters import Count, ModelName, Seed
from workflow.orchestration.summary import describe_last_run
from workflow.servers import check_state_database
from workflow.serving.registered_model import read_data
from workflow.settings import settings
from workflow.text import printable, to_text
from workflow.tracking.connection import connect_mlflow
from workflow.tracking.logging import run_page
from workflow.tracking.run import active_run, find_newest_run, last_run

import cloudpickle
import distributed
import mlflow
import numpy as np
import optuna
from distributed.client import ClosedClientError
from mlflow.entities import Param
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.task_runners import TaskRunner
from prefect_dask import DaskTaskRunner
from sqlalchemy.exc import SQLAlchemyError

STUDIES = settings.state / "tune.db"
STUDY_VERSION = 1  # increase when the same parameters yield a different loss, so that a new study begins
TRIALS = 12
FOLDS = 5  # fewer if a class has fewer images
MAX_IMAGES = 1953  # 10 MB of features, sent with each trial; a larger dataset is sampled
STARTUP_TRIALS = 4  # random trials before Optuna's sampler uses earlier results
DEFAULTS = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "dropout": DROPOUT}
SPACE: dict[str, BaseDistribution] = {
    "epochs": IntDistribution(EPOCHS // 2, 2 * EPOCHS),
    "batch_size": IntDistribution(BATCH_SIZE // 2, 2 * BATCH_SIZE, log=True),
    "learning_rate": FloatDistribution(LEARNING_RATE / 4, 4 * LEARNING_RATE, log=True),
    "dropout": FloatDistribution(0, 0.5),
}
Images = tuple[np.ndarray, np.ndarray, list[str]]  # features, labels and groups of near-duplicates
TrialResult = tuple[float, float, str]  # loss, accuracy and the address of the worker
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a remote worker may not have the project


@task(task_run_name="trial {number}", cache_policy=NO_CACHE)
def try_parameters(number: int, parameters: dict[str, Any], images: Images, folds: int, seed: int) -> TrialResult:
    """Cross-validate heads with these parameters on a Dask worker.

    Raises:
        WorkflowError: the loss is not finite
    """
    import_keras()  # again, because a worker is a separate process
    import keras
    import tensorflow as tf

    shorten_logged_errors()
    features, labels, groups = images
    held_out_in, worker = assign_folds(labels, folds, seed, groups), distributed.get_worker()
    trained_on = held_out_in != np.arange(folds)[:, None]
    with head.training_lock:
        keras.utils.clear_session()
        tf.config.experimental.enable_op_determinism()
        weights = head.fit_heads(features, labels, trained_on, seed=seed, **parameters)
        probabilities = predict_held_out(weights, features, [Folds(held_out_in, trained_on)])[0]
    loss = cross_entropy(probabilities[np.arange(len(labels)), labels])
    if not math.isfinite(loss):
        raise WorkflowError("training diverged: the loss is not finite")
    return loss, float((probabilities.argmax(axis=1) == labels).mean()), worker.address


@contextmanager
def open_study(key: list[Any], seed: int) -> Iterator[optuna.Study]:
    """Lock and open the study for a key, and queue a trial of the defaults unless they have been tried.

    Args:
        key: everything that must be equal for trials to be comparable
        seed: random seed for Optuna's sampler

    Raises:
        WorkflowError: another search holds the lock, or tune.db is unusable
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock_file = STUDIES.with_name(f"{STUDIES.name}.lock")
    with acquire_lock(lock_file, "another search is running in this folder; wait for it to finish"):
        try:
            name, storage = sha256(key)[:12], f"sqlite:///{STUDIES.as_posix()}"
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
            for trial in study.get_trials(states=[TrialState.RUNNING]):  # left behind by a killed search
                study.tell(trial.number, state=TrialState.FAIL)
            trials = study.get_trials(states=[TrialState.COMPLETE, TrialState.WAITING])
            if not any(trial.state == TrialState.WAITING or trial.params == DEFAULTS for trial in trials):
                study.enqueue_trial(DEFAULTS)
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed + len(study.trials))
            yield study
        except SQLAlchemyError as error:
            raise WorkflowError(f"{STUDIES}: {first_line(error)}; repair or delete it") from error


def search(study: optuna.Study, trials: int, max_running: int, images: Images, seed: int) -> None:
    """Run trials in parallel, each as a child of the active MLflow run.

    Args:
        study: suggests the parameters
        trials: number of trials to add
        max_running: maximum number of concurrent trials
        images: images to cross-validate on
        seed: random seed for the folds and the training

    Raises:
        WorkflowError: the connection to the Dask scheduler is lost
    """
    _, labels, groups = images
    first_of_groups = np.unique(groups, return_index=True)[1]
    folds = max(2, min(FOLDS, *np.bincount(labels[first_of_groups], minlength=labels.max() + 1)))
    running: dict[PrefectFuture[TrialResult], tuple[optuna.Trial, str]] = {}
    start = time.monotonic()
    try:
        for done in range(1, trials + 1):
            while len(running) < min(max_running, trials - done + 1):
                trial = study.ask(SPACE)
                future = try_parameters.submit(trial.number, trial.params, images, folds, seed)
                running[future] = trial, create_child_run(trial)
            future = next(as_completed(list(running)))
            end_trial(study, *running[future], future)
            del running[future]
            seconds = (time.monotonic() - start) / done * (trials - done)
            get_run_logger().info("%d of %d trials finished, about %.0f s left", done, trials, seconds)
    except ClosedClientError as error:
        raise WorkflowError("the Dask scheduler no longer responds; restart it and repeat the command") from error
    finally:
        for trial, child in running.values():  # one of them may have ended already
            state = study.tell(trial, state=TrialState.FAIL, skip_if_finished=True).state
            mlflow.MlflowClient().set_terminated(child, "KILLED" if state == TrialState.FAIL else "FINISHED")


def create_child_run(trial: optuna.Trial) -> str:
    """Create a child of the active MLflow run with the trial's parameters, and return its id."""
    client, parent = mlflow.MlflowClient(), active_run()
    tags = {
        "mlflow.parentRunId": parent.info.run_id,
        "prefect_flow_run": flow_run.id,  # if this process is killed, the next run finds and ends runs with this tag
    }
    child = client.create_run(parent.info.experiment_id, tags=tags, run_name=f"trial {trial.number}").info.run_id
    client.log_batch(child, params=[Param(name, str(value)) for name, value in trial.params.items()])
    return child


def end_trial(study: optuna.Study, trial: optuna.Trial, child: str, future: PrefectFuture[TrialResult]) -> None:
    """Record the result or failure of a trial in Optuna, MLflow and the log."""
    client = mlflow.MlflowClient()
    try:
        loss, accuracy, worker = future.result()
    except Exception as error:  # includes KilledWorker: several workers died while running the trial
        status, outcome = "FAILED", f"failed: {first_line(error)}"
        study.tell(trial, state=TrialState.FAIL)
    else:
        status, outcome = "FINISHED", f"complete, val_loss {loss:.4f}, val_accuracy {accuracy:.4f}"
        trial.set_user_attr("val_accuracy", accuracy)
        study.tell(trial, loss)
        client.log_metric(child, "val_loss", loss)
        client.log_metric(child, "val_accuracy", accuracy)
        client.set_tag(child, "worker", worker)
    client.set_tag(child, "outcome", outcome)
    client.set_terminated(child, status)
    parameters = ", ".join(f"{name} {value:.3g}" for name, value in trial.params.items())
    get_run_logger().info("trial %d: %s; %s", trial.number, outcome, parameters)


@flow(name="tune", on_crashed=[mark_cancelled])
def tune(source: str, trials: Count, seed: Seed, dask: str | None, max_running: Count) -> None:
    """Add trials to a study, as child runs of an MLflow run whose tag `best` holds the best parameters."""
    from tune import run_search  # not at the top, because Prefect pickles the flow and its globals with each trial

    run_search(source, trials, seed, dask, max_running)


def run_search(source: str, trials: int, seed: int, dask: str | None, max_running: int) -> None:
    """Prepare the images and run the trials, in one MLflow run; the parameters are those of tune()."""
    source, folder = resolve_source(source, ml_workflow.SOURCE, ml_workflow.DATA_FOLDER)
    with tracked_run(ml_workflow.MODEL_FOLDER, ml_workflow.TRACKING_URI, "tune "):
        downloaded = ml_workflow.download_data(source, folder, return_state=True)
        downloaded.result()
        train, validation, _ = ml_workflow.preprocess_data(
            folder, seed=seed, dask=dask, source=source, wait_for=[downloaded]
        )
        images = sample_images(train, validation, seed)
        key = [STUDY_VERSION, features_key(), train.data.digest, repr(SPACE), DEFAULTS, seed, FOLDS]
        with open_study(key, seed) as study:
            search(study, trials, max_running, images, seed)
            log_best(study)


def sample_images(train: ImageDataset, validation: ImageDataset, seed: int) -> Images:
    """Return the images of both datasets, or a stratified sample if there are more than MAX_IMAGES."""
    images = train.merge(validation)
    chosen = stratified_sample(images.labels, MAX_IMAGES, np.random.default_rng(seed))
    return images.features[chosen], images.labels[chosen], np.array(images.groups)[chosen].tolist()


def log_best(study: optuna.Study) -> None:
    """Log the study's best parameters to the active MLflow run, with their results and those of the defaults.

    Raises:
        WorkflowError: no trial succeeded
    """
    complete = study.get_trials(states=[TrialState.COMPLETE])
    if not complete:
        raise WorkflowError("no trial succeeded; see the log, or the child runs in MLflow")
    best = study.best_trial
    compared = [(f"Best of {len(study.trials)} trials: trial {best.number}", best)]
    compared += [("defaults", trial) for trial in complete if trial.params == DEFAULTS][:1]
    result = "; ".join(
        f"{name}, val_loss {trial.value:.4f}, val_accuracy {trial.user_attrs['val_accuracy']:.4f}"
        for name, trial in compared
    )
    mlflow.set_tags({"best": json.dumps(best.params), "result": result})
    mlflow.log_metric("val_loss", study.best_value)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--source", help="see ml_workflow.py --help; by default, the source and name of the newest run")
    parser.add_argument("--name", type=parse_as(ModelName), help="see ml_workflow.py --help")
    parser.add_argument("--trials", type=parse_as(Count), default=TRIALS, help="number of trials to add to the study")
    parser.add_argument(
        "--seed", type=parse_as(Seed), default=ml_workflow.SEED, help="random seed of all trials and the final run"
    )
    parser.add_argument(
        "--backbone",
        choices=ml_workflow.BACKBONES,
        default=ml_workflow.BACKBONE,
        help="only the head of a backbone can be tuned",
    )
    parser.add_argument("--dask", metavar="ADDRESS", help="address of a Dask scheduler, such as tcp://127.0.0.1:8786")
    arguments = parser.parse_args()
    if arguments.backbone == "none":
        parser.error("--backbone none cannot be tuned; only the head of a backbone can")
    return arguments


def find_source(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the source and the model name: from --source and --name, else from the newest run, else the defaults.

    Raises:
        WorkflowError: the source is unusable
    """
    if arguments.source is not None:
        check_source(source := to_text(arguments.source))
        return source, arguments.name or ""
    connect_mlflow(ml_workflow.TRACKING_URI, settings.state)
    run = find_newest_run(ml_workflow.EXPERIMENT)
    if run is None:
        return ml_workflow.SOURCE, arguments.name or ""
    source = run.data.tags["source"]
    if not is_url(source) and not os.path.isabs(source):  # the sample images replaced the default source
        source = ml_workflow.SOURCE
    try:
        check_source(source)
    except WorkflowError as error:
        raise WorkflowError(f"the source of the newest run is no longer usable; pass --source: {error}") from error
    return source, arguments.name if arguments.name is not None else read_data(run.info.run_id).model_name


def main() -> None:
    with command_line("tune.py"):
        arguments = parse_arguments()
        (source, name), seed = find_source(arguments), arguments.seed
        trials, dask = arguments.trials, arguments.dask
        backbone_weights.read_file()  # fail early if the weights are damaged
        check_state_database(STUDIES)
        images = printable(f"{source}{' for the model ' if name else ''}{name}")
        print(f"Running {trials} cross-validations on {images}; starting the workers takes about 15 s", flush=True)
        with connect_servers(ml_workflow.TRACKING_URI, ml_workflow.EXPERIMENT, ml_workflow.PREFECT_HOME):
            with cluster.connect(dask) if dask else cluster.start_local(trials) as client, tolerate_prefect_outage():
                scheduler = client.scheduler_info(n_workers=-1)
                # The local cluster has a temporary TLS key; for a remote one, Dask's configuration applies.
                options = None if dask else {"security": client.security}
                runner: TaskRunner[Any] = DaskTaskRunner(address=scheduler["address"], client_kwargs=options)
                tune.with_options(task_runner=runner)(source, trials, seed, dask, len(scheduler["workers"]))
            parent = last_run()
            with tolerate_prefect_outage():
                ml_workflow.ml_workflow(source=source, name=name, seed=seed, **json.loads(parent.data.tags["best"]))
            print(
                parent.data.tags["result"],
                f"Search: {run_page(parent, ml_workflow.TRACKING_URI)}",
                *describe_last_run(ml_workflow.TRACKING_URI),
                sep="\n",
            )


if __name__ == "__mp_main__":  # in a local worker, ignore Ctrl-C: the main process stops the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)

if __name__ == "__main__":
    main()
