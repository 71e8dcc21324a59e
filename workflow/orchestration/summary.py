"""The summary that is printed at the end of a run."""

import os
import sys
from pathlib import Path

from workflow.cli import shell_command
from workflow.evaluation import metrics
from workflow.records import SKIPPED, Artifact, DataIssue, DataVersion, Evaluation
from workflow.settings import settings
from workflow.text import printable
from workflow.tracking.connection import command_for, tracking_uri
from workflow.tracking.logging import read_artifact, run_page
from workflow.tracking.registry import CHAMPION, was_promoted
from workflow.tracking.run import last_run

SERVING_PORT = 5001  # in the printed command


def describe_issues(issues: list[DataIssue], data: DataVersion) -> list[str]:
    """Return a line for each kind of data issue, with the number of photos or classes and the first few names."""
    named = [(issue.kind, issue.file or issue.class_name) for issue in issues]
    named += [(SKIPPED, image.file) for image in data.files if image.reason]
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in named):
        names = [name for other, name in named if other == kind]
        lines.append(f"Data issue {kind}: {len(names)} ({metrics.join_names(names)})")
    return lines


def describe_last_run(server: str) -> list[str]:
    """Return lines with the result of the last run, links to it, and commands that use its model; see run_page()."""
    run = last_run()
    tags, uri = run.data.tags, run.data.tags["model_uri"]
    lines = [*tags.get("evidence", "").splitlines(), tags["gate"]]
    if uri.endswith(f"@{CHAMPION}") and not was_promoted(run):
        lines.append("The commands below use the champion, not the new version.")
    photo = "IMAGE"
    if content := read_artifact(run.info.run_id, Artifact.EVALUATION):
        evaluation = Evaluation.from_json(content)
        lines += describe_issues(evaluation.issues, evaluation.data)
        photo = os.path.abspath(evaluation.data.path_of(evaluation.test.predictions[0].file))
    variables = {"PATH": Path(sys.executable).parent, "MLFLOW_TRACKING_URI": tracking_uri()}  # MLflow runs `uvicorn`
    serve = ("mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(SERVING_PORT))
    lines += [
        f"Images: {tags['source']}",
        f"Prefect: {tags['prefect_url']}",
        f"MLflow: {run_page(run, server)}",
        f"Report: {run_page(run, server, Artifact.REPORT)}",
        f"Predict: {command_for('predict.py', photo, '--model', uri)}",
        f"Try it in a browser: {command_for('serve.py', '--model', uri)}",
        f"Serve: {shell_command('-m', *serve, folder=settings.state, **variables)}",
    ]
    return [printable(line) for line in lines if line]
