"""What a run says on the terminal beside its log: which servers it uses, what came of it, and what to do next."""

import os
from pathlib import Path

from workflow.names import locate, printable
from workflow.records import Evaluation
from workflow.running.mlflow_connection import database
from workflow.running.mlflow_run import last_run
from workflow.running.mlflow_store import run_page
from workflow.running.servers import near, shell_command
from workflow.settings import PROJECT, settings

import mlflow

PORT = 5001  # on which the command that is printed serves a model


def describe_servers(prefect: str | None) -> str:
    """Which servers a run uses, and how to keep to oneself; `prefect` is the URL of a server that was there before."""
    store = mlflow.get_tracking_uri()
    told = f"Prefect: {prefect or 'a server of this run alone'}. MLflow: {printable(store)}."
    if prefect != settings.prefect_url and store != settings.mlflow_url:
        return told
    return (
        f"{told} Others may use these servers too. To keep to yourself, set ML_WORKFLOW_PREFECT_URL and "
        "ML_WORKFLOW_MLFLOW_URL to free ports, such as http://127.0.0.1:4201 and http://127.0.0.1:5002."
    )


def describe_last_run(models: Path, server: str) -> list[str]:
    """What came of the last run, where to look at it, and the commands to use its model."""
    run = last_run()
    tags, evaluated = run.data.tags, Evaluation.read(models / run.info.run_id / "evaluation.json")
    photo = locate(evaluated.data.folder, evaluated.candidate.predictions[0].file)
    uri = tags["model_uri"]
    own = {name: value for name, value in os.environ.items() if name.startswith("ML_WORKFLOW_")}
    store = mlflow.get_tracking_uri()
    if store not in (settings.mlflow_url, database(settings.state)):  # else predict.py finds it as this run has
        own["MLFLOW_TRACKING_URI"] = store
    program = near(PROJECT / "predict.py")
    serving = {} if store == database(Path.cwd()) else {"MLFLOW_TRACKING_URI": store}
    serve = ("mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(PORT))
    return [
        *tags.get("evidence", "").splitlines(),
        printable(tags["gate"]),
        f"Images: {printable(tags['source'])}",
        f"Prefect: {tags['prefect_url']}",
        f"MLflow: {run_page(run, server)}",
        f"Predict: {shell_command(program, near(photo), '--model', uri, **own)}",
        f"Try it in a browser: {shell_command(program, '--page', '--model', uri, **own)}",
        f"Serve: {shell_command('-m', *serve, **serving)}",
    ]
