"""Settings of the programs, and defaults for the libraries' environment variables.

Each setting is an environment variable: `ML_WORKFLOW_STATE=/big/disk python ml_workflow.py` stores images, models and
histories on another disk. Importing this module also sets variables that Prefect, MLflow, TensorFlow and Dask read when
they are imported. Variables that are already set keep their values.
"""

import atexit
import gc
import io
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import getproxies

from pydantic import SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PROJECT = Path(__file__).resolve().parent.parent
if PROJECT.is_file():  # the ZIP file that a Dask scheduler or worker receives
    PROJECT = PROJECT.parent
LIBRARIES = {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # no warnings about a missing GPU; errors are still raised
    "DO_NOT_TRACK": "true",  # Prefect's client
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a run prints the URL itself
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # otherwise shown, because Optuna installs tqdm
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",  # sends the metrics of many short epochs in one request
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",  # seconds: a run takes only a few
    "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # waits 12 s instead of 246 s for a server that is restarting
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # with the retries, waits 52 s for a server that hangs
    "DASK_LOGGING__DISTRIBUTED": "critical",  # also in Dask's worker processes; trials report their own failures
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    "PREFECT_API_REQUEST_TIMEOUT": "10",
}
REQUIRED = {  # override the user's values, which would make the programs fail
    "KERAS_BACKEND": "tensorflow",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",  # otherwise logged data may not be readable yet
}
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class Settings(BaseSettings):
    """Settings from environment variables: the names of the fields in capitals, with the prefix ML_WORKFLOW_."""

    model_config = SettingsConfigDict(env_prefix="ML_WORKFLOW_", env_ignore_empty=True)

    state: Path = PROJECT  # images, models, and the histories of Prefect, MLflow and Optuna
    mlflow_url: str = "http://127.0.0.1:5000"  # where `mlflow server` listens
    prefect_url: str = "http://127.0.0.1:4200"  # where `prefect server start` listens
    predictions: str = ""  # SQLAlchemy URL of the prediction log of serve.py; "" for predictions.db in `state`
    token: SecretStr = SecretStr("")  # required of clients by serve.py
    lab_url: str = (  # pinned to a commit, because the lab has moved this folder more than once
        "https://raw.githubusercontent.com/HOGENT-MLOps/mlops-labs/14c761b527a9bba1027f16687a4cba86619021c3"
        "/resources/02-ml-workflow/img-lab2"
    )

    @field_validator("mlflow_url", "prefect_url", "lab_url")
    @classmethod
    def remove_trailing_slash(cls, url: str) -> str:
        return url.rstrip("/")

    @field_validator("state")
    @classmethod
    def make_absolute(cls, folder: Path) -> Path:
        return Path(os.path.expanduser(folder)).absolute()


def prepare_libraries() -> None:
    """Set the variables of LIBRARIES and REQUIRED, and bypass proxies for servers on this machine."""
    if any(option.startswith("e") for option in sys.warnoptions):  # libraries warn while they are imported
        warnings.simplefilter("ignore")
        os.environ.pop("PYTHONWARNINGS", None)
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    os.environ.update(REQUIRED)
    if "IPython" not in sys.modules:  # a notebook shows figures; the programs only write them
        os.environ["MPLBACKEND"] = "agg"
    if proxies := getproxies():
        for scheme in proxies.keys() & {"http", "https"}:
            os.environ.setdefault(f"{scheme.upper()}_PROXY", proxies[scheme])
        hosts = filter(is_valid_proxy_exception, map(str.strip, proxies.get("no", "").split(",")))
        direct = ",".join(filter(None, [*hosts, "127.0.0.1", "localhost", "::1"]))
        os.environ.update(NO_PROXY=direct, no_proxy=direct)


def is_valid_proxy_exception(host: str) -> bool:
    """Return whether httpx (0.28), Prefect's HTTP client, accepts this entry of NO_PROXY; it fails on [::1]."""
    import httpx

    address = f"[{host}]" if host.count(":") > 1 else f"*{host}"
    try:
        httpx.URL(host if "://" in host else f"all://{address}")
    except httpx.InvalidURL:
        return False
    return True


class ErrorStream(io.TextIOWrapper):
    """Standard error that drops what cannot be written, so that a full disk does not make a run fail."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def reopen_closed_streams() -> None:
    """Open the null device for closed standard streams, whose file descriptors a database could otherwise get."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)


def check_environment() -> None:
    """Exit if libraries cannot be imported: the current folder was deleted, or a variable names a missing file."""
    try:
        os.getcwd()
    except OSError as error:
        sys.exit(f"the current folder cannot be used ({error.strerror}); change to another folder")
    for name in CERTIFICATES:
        if (path := os.environ.get(name)) and not os.path.exists(path):
            sys.exit(f"{name} names {path}, which does not exist; correct it, or unset it")


def find_unusable_proxy() -> str | None:
    """Return the environment variable whose proxy httpx (0.28) or requests (2.34) cannot use, or None."""
    import httpx
    from requests.utils import prepend_scheme_if_needed

    for name, address in os.environ.items():
        if address and name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            try:
                url = httpx.Proxy(prepend_scheme_if_needed(address, "http")).url
            except (httpx.InvalidURL, ValueError):
                return name
            if url.scheme not in ("http", "https") or not url.host:
                return name
    return None


def reduce_garbage_collection() -> None:
    """Collect garbage less often, and not at exit: TensorFlow creates a million objects that are never freed.

    This makes a whole run 30% faster (28 s to 20 s, median of 5 runs on 2 cores).
    """
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


def tolerate_full_stderr() -> None:
    """Replace standard error with an ErrorStream without a buffer, unless a notebook or a test has replaced it."""
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        raw: Any = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)  # with `python -u`, the buffer itself is raw
        sys.stderr = ErrorStream(raw, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)


reopen_closed_streams()
tolerate_full_stderr()
check_environment()
settings = Settings()
prepare_libraries()
reduce_garbage_collection()
