"""What a run says on the terminal beside its log: which servers it uses, what came of it, and what to do next."""

from pathlib import Path

from workflow.records import MISLABELED, DataIssue, Evaluation
from workflow.servers import near, shell_command
from workflow.settings import settings
from workflow.text import hide_passwords, printable
from workflow.tracking.connection import command_for_predict, database
from workflow.tracking.logging import run_page
from workflow.tracking.run import last_run

import mlflow
from prefect.settings import get_current_settings

PORT = 5001  # on which the command that is printed serves a model


def describe_servers(has_prefect: bool) -> str:
    """Which servers a run uses, and how to keep to oneself; `has_prefect` is what connect_prefect() gives."""
    prefect, store = get_current_settings().ui_url if has_prefect else None, mlflow.get_tracking_uri()
    told = hide_passwords(f"Prefect: {prefect or 'a server of this run alone'}. MLflow: {printable(store)}.")
    if prefect != settings.prefect_url and store != settings.mlflow_url:
        return told
    return (
        f"{told} Others may use these servers too. To keep to yourself, set ML_WORKFLOW_PREFECT_URL and "
        "ML_WORKFLOW_MLFLOW_URL to free ports, such as http://127.0.0.1:4201 and http://127.0.0.1:5003."
    )


def describe_mislabeled(issues: list[DataIssue]) -> str:
    """Return a line on how many photos are probably mislabeled, and where they are listed; "" without any."""
    count = sum(finding.kind == MISLABELED for finding in issues)
    where = "see report.html among the run's artifacts in MLflow, or the report in Prefect"
    return f"Probably mislabeled: {count} photo(s); {where}" if count else ""


def describe_last_run(models: Path, server: str) -> list[str]:
    """What came of the last run, where to look at it, and the commands to use its model."""
    run = last_run()
    tags, evaluated = run.data.tags, Evaluation.read(models / run.info.run_id / "evaluation.json")
    photo = evaluated.data.path_of(evaluated.test.predictions[0].file)
    uri = tags["model_uri"]
    store = mlflow.get_tracking_uri()
    serving = {} if store == database(Path.cwd()) else {"MLFLOW_TRACKING_URI": store}
    serve = ("mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(PORT))
    told = [
        *tags.get("evidence", "").splitlines(),
        tags["gate"],
        describe_mislabeled(evaluated.issues),
        f"Images: {tags['source']}",
        f"Prefect: {tags['prefect_url']}",
        f"MLflow: {run_page(run, server)}",
        f"Predict: {command_for_predict(near(photo), '--model', uri)}",
        f"Try it in a browser: {command_for_predict('--page', '--model', uri)}",
        f"Serve: {shell_command('-m', *serve, **serving)}",
    ]
    return [printable(line) for line in told if line]
