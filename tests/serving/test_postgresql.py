"""The prediction log of several replicas in a real PostgreSQL."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from support.environments import make_environment
from support.project import PROJECT, free_port
from workflow.errors import WorkflowError
from workflow.serving.prediction_log import open_database

import pytest

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path())
REPLICA = """
import sys, datetime
from workflow.serving import prediction_log
from workflow.serving.metrics import Metrics
log = prediction_log.PredictionLog(prediction_log.open_database(), Metrics(), 0)
log.thread.start()
fields = dict(time=datetime.datetime(2026, 1, 1), request_id="r", image=0, route="/predict", digest="ab" * 32)
fields |= dict(version="models:/m/1", label="apples", probability=0.9, unknown=False, milliseconds=1.0)
for number in range(100):
    log.add(fields | {"id": f"{sys.argv[1]}-{number}"})
shadow = {"shadow_version": "models:/m/2", "shadow_label": "oranges", "shadow_probability": 0.6}
log.add(shadow | {"row": f"{sys.argv[1]}-0"})
log.close()
"""
FORGET = "from workflow.serving import prediction_log; print(prediction_log.forget('ab' * 32))"


@contextlib.contextmanager
def postgresql(folder: Path):
    """Run a server on a free port, as the user postgres, whom root needs for it, and yield the URL of its database."""
    if not (PROGRAMS / "initdb").exists() or os.geteuid():
        pytest.skip("needs PostgreSQL (apt-get install postgresql) and root")
    folder.mkdir()
    shutil.chown(folder, "postgres")
    for parent in (folder, *folder.parents):
        parent.chmod(parent.stat().st_mode | 0o055)
    port, data = free_port(), folder / "data"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
    run = ["runuser", "-u", "postgres", "--", PROGRAMS / "pg_ctl", "-D", data, "-s", "-w"]
    subprocess.run(["runuser", "-u", "postgres", "--", PROGRAMS / "initdb", "-D", data, "-A", "trust"], check=True)
    subprocess.run([*run, "-l", folder / "log", "-o", options, "start"], check=True)
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*run, "-m", "fast", "stop"], check=True)


@pytest.mark.slow
@pytest.mark.survived("prediction log: two replicas create its table at once")
def test_replicas_share_a_postgresql_database(tmp_path):
    python = make_environment(tmp_path / "venv", "psycopg[binary]==3.3.9")
    with postgresql(tmp_path / "postgresql") as url:
        environment = os.environ | {"ML_WORKFLOW_PREDICTIONS": url, "ML_WORKFLOW_STATE": str(tmp_path / "state")}
        options = {"cwd": PROJECT, "env": environment, "stdout": subprocess.PIPE, "text": True}
        replicas = [subprocess.Popen([python, "-c", REPLICA, str(number)], **options) for number in range(2)]
        for replica in replicas:
            replica.communicate(timeout=60)
        assert [replica.returncode for replica in replicas] == [0, 0]
        end = subprocess.run([python, "-c", FORGET], **options)
    assert end.stdout.strip() == "200"


def test_missing_driver_is_named():
    with pytest.raises(WorkflowError, match="pip install"):
        open_database("postgresql+psycopg2://127.0.0.1/predictions")
