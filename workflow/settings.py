"""Where state is kept and which addresses are asked, and what the libraries read from the environment.

Each setting has a variable of the environment: `ML_WORKFLOW_STATE=/big/disk python ml_workflow.py` keeps images,
models and histories on another disk. Importing this file also sets what Prefect, MLflow, TensorFlow and Dask read from
the environment when they are imported themselves; a value that is there already is left alone.
"""

import atexit
import gc
import os
from pathlib import Path
from urllib.request import getproxies

from pydantic import field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PROJECT = Path(__file__).resolve().parent.parent
LIBRARIES = {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # TensorFlow says nothing about a GPU that is not there; errors still raise
    "DO_NOT_TRACK": "true",  # of Prefect's client
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the last lines of a run have the URL
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # MLflow draws one because Optuna installs tqdm
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",  # the metrics of many short epochs travel in one request
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a call waits 12 s, not 246 s, for a server that is started again,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # and 52 s for a server that hangs
    "DASK_LOGGING__DISTRIBUTED": "critical",  # also in the processes that Dask starts; a trial reports its own end
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    "PREFECT_API_REQUEST_TIMEOUT": "10",
}


class Settings(BaseSettings):
    """Each field is set by the variable of its name with ML_WORKFLOW_ before it."""

    model_config = SettingsConfigDict(env_prefix="ML_WORKFLOW_", env_ignore_empty=True)

    state: Path = PROJECT  # the folder of images, models, and the histories of Prefect, MLflow and Optuna
    mlflow_url: str = "http://127.0.0.1:5000"  # where `mlflow server` listens
    prefect_url: str = "http://127.0.0.1:4200"  # where `prefect server start` listens
    lab_url: str = (  # the lab's photos at one commit, because the lab has moved this folder more than once
        "https://raw.githubusercontent.com/HOGENT-MLOps/mlops-labs/14c761b527a9bba1027f16687a4cba86619021c3"
        "/resources/02-ml-workflow/img-lab2"
    )

    @field_validator("mlflow_url", "prefect_url", "lab_url")
    @classmethod
    def without_slash(cls, url: str) -> str:
        return url.rstrip("/")

    @field_validator("state")
    @classmethod
    def make_absolute(cls, folder: Path) -> Path:
        return Path(os.path.expanduser(folder)).absolute()


def prepare_libraries() -> None:
    """Sets what the libraries read from the environment, and keeps the servers of this machine free of proxies."""
    for name, value in LIBRARIES.items():
        os.environ.setdefault(name, value)
    if proxies := getproxies():
        for scheme in proxies.keys() & {"http", "https"}:
            os.environ.setdefault(f"{scheme.upper()}_PROXY", proxies[scheme])
        hosts = filter(is_readable, map(str.strip, proxies.get("no", "").split(",")))
        direct = ",".join(filter(None, [*hosts, "127.0.0.1", "localhost", "::1"]))
        os.environ.update(NO_PROXY=direct, no_proxy=direct)


def is_readable(host: str) -> bool:
    """Whether httpx (0.28), with which Prefect asks its server, reads an entry of NO_PROXY; it stops at [::1]."""
    import httpx

    address = f"[{host}]" if host.count(":") > 1 else f"*{host}"
    try:
        httpx.URL(host if "://" in host else f"all://{address}")
    except httpx.InvalidURL:
        return False
    return True


def find_unusable_proxy() -> str | None:
    """The variable of the environment that names a proxy which httpx and requests cannot use, if there is one."""
    for name, value in os.environ.items():
        if value and name.lower() in ("http_proxy", "https_proxy", "all_proxy") and not is_proxy(value):
            return name
    return None


def is_proxy(address: str) -> bool:
    """Whether httpx (0.28) and requests (2.34) can both use a proxy; its address may be without http://."""
    import httpx
    from requests.utils import prepend_scheme_if_needed

    try:
        url = httpx.Proxy(prepend_scheme_if_needed(address, "http")).url
    except (httpx.InvalidURL, ValueError):
        return False
    return url.scheme in ("http", "https") and url.host != ""


def spare_garbage_collection() -> None:
    """Makes Python search for garbage less often, and not at its exit.

    TensorFlow makes a million objects that live until the end: to search them costs seconds.
    """
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


settings = Settings()
prepare_libraries()
spare_garbage_collection()
