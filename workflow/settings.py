"""What Prefect, MLflow, TensorFlow and Dask read from the environment when they are imported."""

import os
from urllib.request import getproxies

for name, value in {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # no word about a GPU that is not there; errors still raise
    "DO_NOT_TRACK": "true",  # Prefect's client
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the script's last lines say it better
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # which MLflow draws since Optuna brings tqdm
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",  # the metrics of many short epochs go in one request
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # a server that is started again is waited for: 12 s a call, not 246 s;
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # one that hangs costs 52 s
    "DASK_LOGGING__DISTRIBUTED": "critical",  # also of the processes that it starts; a trial tells its own end
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    "PREFECT_API_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(name, value)
if proxies := getproxies():  # none of them is for the servers on this machine
    for scheme in proxies.keys() & {"http", "https"}:
        os.environ.setdefault(f"{scheme.upper()}_PROXY", proxies[scheme])
    direct = ",".join(filter(None, [proxies.get("no"), "127.0.0.1", "localhost"]))
    os.environ.update(NO_PROXY=direct, no_proxy=direct)
