"""Which Prefect and MLflow a program talks to, and how it ends.

Prefect is imported where it is used, because predict.py starts faster without it.
"""

import _thread
import argparse
import asyncio
import atexit
import gc
import importlib
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from workflow.errors import WorkflowError

import mlflow
import requests
from filelock import FileLock
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

WINDOWS = os.name == "nt"
PREFECT_URL = "http://127.0.0.1:4200"  # where `prefect server start` listens
AGAIN_SECONDS = 0.1  # until a signal that was dropped comes again
PENDING_SECONDS = 5  # for which a signal may be deferred
EXIT_SECONDS = 3  # for a program that was stopped to end by itself
SERVER_SECONDS = 90  # to wait for a Prefect server of our own, most of it for its new database
STOP_SIGNALS = (signal.SIGINT,) if WINDOWS else (signal.SIGINT, signal.SIGTERM)  # there Prefect needs its own SIGTERM
STORE_ERRORS = (MlflowException, requests.RequestException, SQLAlchemyError)
RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
silent = threading.Event()  # Prefect's server did not answer
SERVER_PROGRAM = """
import os, signal, sys, threading, uvicorn
end_with_parent = lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGTERM))
threading.Thread(target=end_with_parent, daemon=True).start()
app = "prefect.server.api.server:create_app"
uvicorn.run(app, factory=True, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""  # a Prefect server that ends when its standard input closes, that is, when the run is gone, however it ended

gc.set_threshold(100_000)  # TensorFlow makes a million objects that live: to search them for garbage costs seconds
atexit.register(gc.freeze)  # nor search them once more at the exit; here, because a served run has its own process


class Parser(argparse.ArgumentParser):
    """A command line whose misuse ends in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; --help shows the usage\n")


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """The whole of a program: what stops it ends in one line and exit status 1, and nobody waits for a search."""
    sys.stdout.reconfigure(errors="backslashreplace")  # not every file name can be printed
    sys.unraisablehook = send_again
    try:
        yield
    except (WorkflowError, MlflowException) as error:
        sys.exit(f"{program}: {first_line(error)}")
    except KeyboardInterrupt:
        deadline = threading.Timer(EXIT_SECONDS, os._exit, [1])  # for what is on its way to a server that hangs
        deadline.daemon = True
        deadline.start()
        sys.exit(f"{program}: stopped")
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def send_again(unraisable) -> None:
    """Sends Ctrl-C or a signal once more where C code, such as TensorFlow's conversions, has dropped its exception."""
    error = unraisable.exc_value
    number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else getattr(error, "signal", None)  # Prefect's
    if number is None:
        sys.__unraisablehook__(unraisable)
    else:
        send(number, AGAIN_SECONDS)


def send(number: int, seconds: float) -> threading.Timer:
    """Sends a signal to the main thread after so many seconds, unless the timer is cancelled."""
    main = threading.main_thread().ident
    interrupt = _thread.interrupt_main if WINDOWS else lambda number: signal.pthread_kill(main, number)  # ends a wait
    timer = threading.Timer(seconds, interrupt, [number])
    timer.daemon = True
    timer.start()
    return timer


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" with exception HTTPConnectionPool")[0]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of its block into a WorkflowError that names the path."""
    try:
        yield
    except OSError as error:
        raise WorkflowError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def deferred_signals() -> Iterator[Callable]:
    """Keeps Ctrl-C and SIGTERM pending until the function that it gives is called, or its block ends.

    In the middle of TensorFlow an exception of theirs is dropped, or becomes a RuntimeError; in the middle of an
    import, such as MLflow tries at each of its calls, it leaves Python's import lock held, and other threads waiting.
    A second signal delivers them at once, and so do PENDING_SECONDS.
    """
    handlers, pending = {}, []

    def defer(number: int, frame) -> None:
        if pending:
            deliver()
        else:
            pending.append((number, frame, send(number, PENDING_SECONDS)))

    def deliver(*_, **__) -> None:  # whatever a Keras callback is told
        while pending:
            number, frame, timer = pending.pop()
            timer.cancel()
            handlers[number](number, frame)

    try:
        if threading.current_thread() is threading.main_thread():  # no other can set handlers, nor is interrupted
            for number in STOP_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, defer)
        yield deliver
    finally:
        for number in reversed(handlers):
            signal.signal(number, handlers[number])
        deliver()


def server_answers(url: str, pattern: str, remedy: str) -> bool:
    """Whether a server is there: True when it answers with the pattern, False when nothing listens.

    Raises WorkflowError with the remedy when something else listens.
    """
    address = urlsplit(url)
    try:
        socket.create_connection((address.hostname, address.port), timeout=2).close()
    except OSError:
        return False
    try:
        response = requests.get(url, timeout=5)
        if response.ok and re.fullmatch(pattern, response.text.strip()):
            return True
    except requests.RequestException:
        pass
    raise WorkflowError(f"port {address.port} is taken by something else than {remedy}")


def require(url: str, name: str) -> None:
    """Raises WorkflowError when no server answers at a URL that the user has set."""
    try:
        if requests.get(url, timeout=5).ok or not urlsplit(url).hostname.startswith(("127.", "localhost")):
            return  # a server far away may answer this question only to those it knows
    except requests.RequestException:
        pass
    raise WorkflowError(f"{name} is set, but no such server answers there ({url}): start it, or unset {name}")


def connect_prefect(home: Path) -> str:
    """Connects Prefect to the user's own server, else to the one on this machine.

    Gives "", or, when there is none and the run needs temporary_server(), the command that shows it later.
    """
    from prefect.settings import get_current_settings

    one_line_errors()
    if own := get_current_settings().api.url:
        require(f"{own}/health", "PREFECT_API_URL")
        return ""
    remedy = "Prefect: free it, or set PREFECT_API_URL to your server"
    if server_answers(f"{PREFECT_URL}/api/health", "true", remedy):
        use_prefect(PREFECT_URL)
        return ""
    return f"To look at it, start Prefect: {command('prefect server start --no-prompt', PREFECT_HOME=home)}"


def command(text: str, **settings) -> str:
    """A line that a person can copy into the shell at hand, whether the environment is activated or not."""
    if WINDOWS:
        return "".join(f'$Env:{name} = "{settings[name]}"; ' for name in settings) + f'& "{sys.executable}" -m {text}'
    return "".join(f'{name}="{settings[name]}" ' for name in settings) + f'"{sys.executable}" -m {text}'


def use_prefect(url: str) -> None:
    """Makes Prefect talk to the server at a URL; links lead to PREFECT_URL, where the history can be seen later."""
    from prefect.context import refresh_global_settings_context

    os.environ.update(PREFECT_API_URL=f"{url}/api", PREFECT_UI_URL=PREFECT_URL)
    refresh_global_settings_context()


@contextmanager
def temporary_server(home: Path) -> Iterator[str]:
    """Connects Prefect to a server with its history in `home`, which ends with the block, or with this process."""
    with writing(home):
        home.mkdir(exist_ok=True)
        (home / "server.log").touch()
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    with open(home / "server.log", "ab") as log, FileLock(home / ".lock"):  # the first one makes the database
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER_PROGRAM, str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the run; the server ends after it
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        wait_for(server, url, home / "server.log")
    try:
        use_prefect(url)
        print(f"Prefect's UI while this run lasts: {url}", flush=True)
        yield url
    finally:
        for handler in logging.getLogger("prefect.flow_runs").handlers:
            handler.flush()  # Prefect sends its log lines late
        stop(server)


def serve(flow, name: str, **options) -> None:
    """What flow.serve() does, until KeyboardInterrupt; SIGTERM raises that too, when the run at hand has been ended."""
    import httpx
    from prefect.runner import Runner

    logging.getLogger("prefect.runner").setLevel(logging.WARNING)
    runner = Runner(name, limit=1)
    runner.handle_sigterm = lambda *_: runner.execute_in_background(runner.astop)  # Prefect's own never awaits astop()
    try:
        runner.add_flow(flow, name, **options)
        asyncio.run(runner.start())
    except httpx.HTTPError as error:
        raise WorkflowError("Prefect does not answer: start its server and repeat the command") from error
    raise KeyboardInterrupt


def stop(server: subprocess.Popen) -> None:
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def wait_for(server: subprocess.Popen, url: str, log: Path) -> None:
    """Returns when the server answers; raises WorkflowError when it ended or is not there in time."""
    deadline = time.monotonic() + SERVER_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"{url}/api/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.05)
    stop(server)
    raise WorkflowError(f"Prefect's server did not start: {log} says why")


def connect_mlflow(server: str, folder: Path, experiment: str | None = None) -> str:
    """Connects MLflow to the user's own server, else to the one on this machine, else to SQLite in `folder`.

    The experiment becomes the current one, and is made when there is none. Gives the command that shows the run
    later, "" when a server already does.
    """
    if own := os.environ.get("MLFLOW_TRACKING_URI"):
        if own.startswith("http"):
            require(f"{own}/version", "MLFLOW_TRACKING_URI")
    elif server_answers(
        f"{server}/version",
        r"\d+\.\d+.*",
        "MLflow: free it, or set MLFLOW_TRACKING_URI (to your server, or to sqlite:///mlflow.db for none)",
    ):
        mlflow.set_tracking_uri(server)
    else:
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').as_posix()}")
    try:
        with writing(folder), FileLock(folder / ".mlflow.lock"):  # processes that make one database together break it
            if experiment:
                use_experiment(experiment, folder)
            else:
                mlflow.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        raise WorkflowError(f"MLflow at {mlflow.get_tracking_uri()}: {first_line(error)}") from None
    if mlflow.get_tracking_uri().startswith("sqlite"):
        text = f'mlflow server --backend-store-uri "{mlflow.get_tracking_uri()}"'
        return f"To look at it, start MLflow: {command(text)}"
    return ""


def use_experiment(name: str, folder: Path) -> None:
    """Makes the experiment the current one; in `folder`'s own database its artifacts lie in `folder`.

    A server would otherwise keep them under an address that only a server can write to.
    """
    experiment = mlflow.get_experiment_by_name(name)
    local = not mlflow.get_tracking_uri().startswith("http")
    if experiment is None and (local or serves(folder)):
        mlflow.create_experiment(name, artifact_location=(folder / "mlartifacts").as_uri())
    elif experiment and local and experiment.artifact_location.startswith("mlflow-artifacts:"):
        raise WorkflowError(f"a server keeps the artifacts of {name}: start it with `mlflow server` in {folder}")
    chosen = mlflow.set_experiment(name).experiment_id
    if os.environ.get("MLFLOW_RUN_ID") and os.environ.get("MLFLOW_EXPERIMENT_ID", chosen) != chosen:
        raise WorkflowError(f"the run was opened in another experiment: mlflow run needs --experiment-name {name}")


def serves(folder: Path) -> bool:
    """Whether the MLflow server keeps its runs in `folder`: its first experiment was made in the same millisecond."""
    try:
        with closing(sqlite3.connect(f"{(folder / 'mlflow.db').as_uri()}?mode=ro", uri=True)) as database:
            (created,) = database.execute("SELECT creation_time FROM experiments WHERE experiment_id = 0").fetchone()
    except sqlite3.Error:
        return False
    return created == mlflow.get_experiment("0").creation_time


def show(artifact: Callable, *arguments, **options):
    """Makes or updates a Prefect artifact; a server that does not answer fails nothing, and is asked no more."""
    from prefect import get_run_logger

    if not silent.is_set():
        try:
            return artifact(*arguments, **options)
        except Exception as error:
            silent.set()
            for name in RUN_LOGGERS:
                logging.getLogger(name).handlers.clear()  # they send to Prefect; the terminal has another
            get_run_logger().warning("Prefect does not answer, the run goes on without its UI: %s", error)


class Progress:
    """Shows how far a step has come: a progress bar in the Prefect UI, and a line in the log unless it has its own."""

    def __init__(self, key: str, text: str = ""):
        self.key, self.text, self.artifact, self.shown = key, text, None, 0.0

    def __call__(self, done: int, total: int) -> None:
        """Updates the bar at most every tenth of the whole, because each update costs a request."""
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = 100 * done / total
        if self.artifact is None:
            self.artifact = show(create_progress_artifact, percent, key=self.key)
        elif percent < self.shown + 10 and done < total:
            return
        elif self.artifact:
            show(update_progress_artifact, self.artifact, percent)
        self.shown = percent
        if self.text:
            get_run_logger().info("%s: %d of %d", self.text, done, total)


def import_keras() -> None:
    """Imports Keras, and TensorFlow with it, without scikit-learn.

    keras.wrappers (Keras 3.15) imports scikit-learn where it is installed, which takes 0.6 s and is of no use here.
    This function becomes unnecessary when Keras imports its wrappers only where they are used.
    """
    absent = "sklearn" not in sys.modules
    if absent:
        sys.modules["sklearn"] = None  # the import of it fails, as where it is not installed
    try:
        importlib.import_module("keras")
    finally:
        if absent:
            del sys.modules["sklearn"]


def run_url(run: mlflow.ActiveRun, server: str) -> str:
    """The run's page in MLflow's UI; `server` stands in where the run went to a database."""
    uri = mlflow.get_tracking_uri()
    base = uri.rstrip("/") if uri.startswith("http") else server
    return f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"


def one_line_errors() -> None:
    """Makes Prefect log what is no bug as one line, without a traceback."""
    import httpx

    told = (WorkflowError, OSError, httpx.HTTPError, *STORE_ERRORS)

    def shorten(record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], told):
            record.msg, record.args, record.exc_info = first_line(record.exc_info[1]), (), None
        return True

    for name in RUN_LOGGERS:
        logging.getLogger(name).addFilter(shorten)
    for name in ("urllib3.connectionpool", "mlflow.utils.async_logging", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they try again, or log_missing() does
