"""The summary that is printed at the end of a run."""

from pathlib import Path

from workflow.cli import relative_to_cwd, shell_command
from workflow.records import MISLABELED, Artifact, DataIssue, Evaluation
from workflow.text import printable
from workflow.tracking.connection import command_for, database_uri
from workflow.tracking.logging import read_artifact, run_page
from workflow.tracking.run import last_run

import mlflow

SERVING_PORT = 5001  # in the printed command


def describe_mislabeled(issues: list[DataIssue]) -> str:
    """Return a line with the number of photos that are probably mislabeled; "" if there are none."""
    count = sum(issue.kind == MISLABELED for issue in issues)
    return f"Probably mislabeled photos: {count}; see report.html in MLflow, or the report in Prefect" if count else ""


def describe_last_run(server: str) -> list[str]:
    """Return lines with the result of the last run, links to it, and commands that use its model; see run_page()."""
    run = last_run()
    tags, uri = run.data.tags, run.data.tags["model_uri"]
    lines = [*tags.get("evidence", "").splitlines(), tags["gate"]]
    photo = "IMAGE"
    if content := read_artifact(run.info.run_id, Artifact.EVALUATION):
        evaluation = Evaluation.from_json(content)
        lines.append(describe_mislabeled(evaluation.issues))
        photo = relative_to_cwd(evaluation.data.path_of(evaluation.test.predictions[0].file))
    store = mlflow.get_tracking_uri()
    variables = {} if store == database_uri(Path.cwd()) else {"MLFLOW_TRACKING_URI": store}
    serve = ("mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(SERVING_PORT))
    lines += [
        f"Images: {tags['source']}",
        f"Prefect: {tags['prefect_url']}",
        f"MLflow: {run_page(run, server)}",
        f"Predict: {command_for('predict.py', photo, '--model', uri)}",
        f"Try it in a browser: {command_for('serve.py', '--model', uri)}",
        f"Serve: {shell_command('-m', *serve, **variables)}",
    ]
    return [printable(line) for line in lines if line]
