"""The Kubeflow pipeline, compiled and run by kfp's local runner in a separate environment."""

import subprocess
from pathlib import Path

from support.environments import make_environment
from support.project import PROJECT

import mlflow
import pytest

KFP = "kfp==2.17.3"
PIPELINE = PROJECT / "examples/kubeflow/pipeline.py"
RUN = """
import sys
from kfp import local
from pipeline import ml_workflow
local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1])
ml_workflow(source=sys.argv[2], tracking_uri=sys.argv[3], epochs=5)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return make_environment(tmp_path_factory.mktemp("kfp") / "environment", KFP)


@pytest.mark.slow
def test_pipeline_compiles_reproducibly(python, tmp_path):
    for name in ("first.yaml", "second.yaml"):
        subprocess.run([python, str(PIPELINE), str(tmp_path / name)], check=True, timeout=60)
    compiled = (tmp_path / "first.yaml").read_text()
    assert compiled == (tmp_path / "second.yaml").read_text()
    assert "triggerPolicy" in compiled  # the gate is a condition


@pytest.mark.slow
def test_closed_gate_registers_no_version(python, project, image_server, tmp_path):
    with project.mlflow_server() as url:
        ends = []
        for _ in range(2):
            environment = project.environment() | {"PYTHONPATH": f"{PROJECT}:{PIPELINE.parent}"}
            command = [python, "-c", RUN, str(tmp_path / "artifacts"), image_server.url, url]
            ends += [
                subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            ]
            assert ends[-1].returncode == 0, ends[-1].stdout + ends[-1].stderr
        client = mlflow.MlflowClient(url)
        (version,) = client.search_model_versions("name = 'apples-oranges'")
        assert client.get_model_version_by_alias("apples-oranges", "champion").version == version.version
        assert "majority-class baseline" in ends[0].stdout + ends[0].stderr
        assert "version 1, the champion" in ends[1].stdout + ends[1].stderr
        experiment = client.get_experiment_by_name("ml-workflow")
        runs = client.search_runs([experiment.experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
        assert {len(client.get_metric_history(run.info.run_id, "loss")) for run in runs} == {5}
